"""Chunked cross-attention written as its definition: every token gathers the keys of the chunk that it reads."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from retro_jax.kernels.attention import KeyMask
from retro_jax.kernels.attention import reference as attention_reference


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
    """See :func:`retro_jax.kernels.chunked_cross_attention.chunked_cross_attention`; memory grows with T * S."""
    B, T, N, H = q_BTNH.shape
    L, S, G = k_BLSGH.shape[1:4]
    first_B = jnp.broadcast_to(jnp.asarray(first_chunk_len, jnp.int32), (B,))
    chunk_BT = (jnp.arange(T, dtype=jnp.int32)[None, :] - first_B[:, None] + 1) // chunk_len
    reads_BT = (chunk_BT >= 0) & (chunk_BT < L)
    rows_B1 = jnp.arange(B)[:, None]
    read = jnp.clip(chunk_BT, 0, L - 1)
    mask_BTS = key_mask_BLS[rows_B1, read] & reads_BT[:, :, None]
    o = attention_reference.attention(
        q_BTNH.reshape(B * T, 1, N, H),
        k_BLSGH[rows_B1, read].reshape(B * T, S, G, H),
        v_BLSGH[rows_B1, read].reshape(B * T, S, G, H),
        KeyMask(mask_BTS.reshape(B * T, S)),
        null_logit_N,
        name="cca",
        dropout=dropout,
        keep_XNQS=None if keep_BTNS is None else keep_BTNS.reshape(B * T, N, 1, S),
    )
    return o.reshape(B, T, N, H)
