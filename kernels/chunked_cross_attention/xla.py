"""Chunked cross-attention for XLA: queries are shifted to the readers of each chunk, attention runs per chunk, and the result is
shifted back. Rows on the grid shift by slices; rows with a first chunk of their own by one gather each way."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from retro_jax.kernels.attention import xla as attention_xla


def chunked_cross_attention(
    q_BTNH: jax.Array,
    k_BLSGH: jax.Array,
    v_BLSGH: jax.Array,
    key_mask_BLS: jax.Array,
    null_logit_N: jax.Array | None,
    *,
    chunk_len: int,
    first_chunk_len_B: jax.Array | None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """See :func:`retro_jax.kernels.chunked_cross_attention.chunked_cross_attention`."""
    B, T, N, H = q_BTNH.shape
    L, S, G = k_BLSGH.shape[1:4]
    readers = to_readers(q_BTNH, L, chunk_len, first_chunk_len_B)
    o = attention_xla.attention(
        readers.reshape(B * L, chunk_len, N, H),
        k_BLSGH.reshape(B * L, S, G, H),
        v_BLSGH.reshape(B * L, S, G, H),
        key_mask_BLS.reshape(B * L, 1, S),
        null_logit_N,
        dropout=dropout,
        dropout_key=dropout_key,
    )
    return from_readers(o.reshape(B, L * chunk_len, N, H), T, chunk_len, first_chunk_len_B)


def to_readers(x_BTNH: jax.Array, num_chunks: int, chunk_len: int, first_chunk_len_B: jax.Array | None) -> jax.Array:
    """[B, T, ...] to [B, L * C, ...]: row f - 1 + i at place i, zeros past the row's end."""
    T = x_BTNH.shape[1]
    width = num_chunks * chunk_len
    if first_chunk_len_B is None:
        return _pad(x_BTNH[:, chunk_len - 1 :], 0, width - (T - chunk_len + 1))
    at_BW = first_chunk_len_B[:, None] - 1 + jnp.arange(width, dtype=jnp.int32)[None, :]
    moved = jnp.take_along_axis(x_BTNH, jnp.clip(at_BW, 0, T - 1)[:, :, None, None], axis=1)
    return jnp.where((at_BW < T)[:, :, None, None], moved, jnp.zeros_like(moved))


def from_readers(o_BWNH: jax.Array, length: int, chunk_len: int, first_chunk_len_B: jax.Array | None) -> jax.Array:
    """The inverse of :func:`to_readers`: zeros before row f - 1, and past the last chunk's readers."""
    width = o_BWNH.shape[1]
    if first_chunk_len_B is None:
        return _pad(o_BWNH[:, : length - chunk_len + 1], chunk_len - 1, 0)
    at_BT = jnp.arange(length, dtype=jnp.int32)[None, :] - first_chunk_len_B[:, None] + 1
    moved = jnp.take_along_axis(o_BWNH, jnp.clip(at_BT, 0, width - 1)[:, :, None, None], axis=1)
    return jnp.where(((at_BT >= 0) & (at_BT < width))[:, :, None, None], moved, jnp.zeros_like(moved))


def _pad(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2)))
