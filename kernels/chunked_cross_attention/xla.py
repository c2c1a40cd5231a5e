"""Chunked cross-attention for XLA: queries are shifted to the readers of each chunk, attention runs per chunk, and the result is
shifted back. Rows on the grid shift by slices; rows with a first chunk of their own by one gather each way."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from retro_jax.kernels.attention import KeyMask
from retro_jax.kernels.attention import xla as attention_xla


def chunked_cross_attention(
    q_BTNH: jax.Array,
    k_BLSGH: jax.Array,
    v_BLSGH: jax.Array,
    key_mask_BLS: jax.Array,
    null_logit_N: jax.Array | None,
    *,
    chunk_len: int,
    first_chunk_len: jax.Array | int,
    dropout: float = 0.0,
    keep_BTNS: jax.Array | None = None,
) -> jax.Array:
    """See :func:`retro_jax.kernels.chunked_cross_attention.chunked_cross_attention`."""
    B, T, N, H = q_BTNH.shape
    L, S, G = k_BLSGH.shape[1:4]
    readers = to_readers(q_BTNH, L, chunk_len, first_chunk_len)
    keep_XNCS = None
    if keep_BTNS is not None:
        keep_BWNS = to_readers(keep_BTNS, L, chunk_len, first_chunk_len)
        keep_XNCS = keep_BWNS.reshape(B * L, chunk_len, N, S).swapaxes(1, 2)
    o = attention_xla.attention(
        readers.reshape(B * L, chunk_len, N, H),
        k_BLSGH.reshape(B * L, S, G, H),
        v_BLSGH.reshape(B * L, S, G, H),
        KeyMask(key_mask_BLS.reshape(B * L, S)),
        null_logit_N,
        name="cca",
        dropout=dropout,
        keep_XNQS=keep_XNCS,
    )
    return from_readers(o.reshape(B, L * chunk_len, N, H), T, first_chunk_len)


def to_readers(x_BTNH: jax.Array, num_chunks: int, chunk_len: int, first_chunk_len: jax.Array | int) -> jax.Array:
    """[B, T, ...] to [B, L * C, ...]: row f - 1 + i at place i, zeros before the row's start and past its end."""
    T = x_BTNH.shape[1]
    width = num_chunks * chunk_len
    if isinstance(first_chunk_len, int):
        return _moved(x_BTNH, first_chunk_len - 1, width)
    at_BW = first_chunk_len[:, None] - 1 + jnp.arange(width, dtype=jnp.int32)[None, :]
    moved = jnp.take_along_axis(x_BTNH, jnp.clip(at_BW, 0, T - 1)[:, :, None, None], axis=1)
    return jnp.where((at_BW < T)[:, :, None, None], moved, jnp.zeros_like(moved))


def from_readers(o_BWNH: jax.Array, length: int, first_chunk_len: jax.Array | int) -> jax.Array:
    """The inverse of :func:`to_readers`: zeros before row f - 1, and past the last chunk's readers."""
    width = o_BWNH.shape[1]
    if isinstance(first_chunk_len, int):
        return _moved(o_BWNH, 1 - first_chunk_len, length)
    at_BT = jnp.arange(length, dtype=jnp.int32)[None, :] - first_chunk_len[:, None] + 1
    moved = jnp.take_along_axis(o_BWNH, jnp.clip(at_BT, 0, width - 1)[:, :, None, None], axis=1)
    return jnp.where(((at_BT >= 0) & (at_BT < width))[:, :, None, None], moved, jnp.zeros_like(moved))


def _moved(x: jax.Array, start: int, length: int) -> jax.Array:
    """Rows ``start`` to ``start + length`` of dim 1, zeros where there are none."""
    before, after = max(0, -start), max(0, start + length - x.shape[1])
    inside = x[:, max(0, start) : min(x.shape[1], start + length)]
    return jax.lax.pad(inside, jnp.zeros((), x.dtype), ((0, 0, 0), (before, after, 0), *((0, 0, 0),) * (x.ndim - 2)))
