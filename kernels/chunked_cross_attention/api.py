"""Chunked cross-attention: checks and choice of implementation."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import jax

from retro_jax.kernels.choice import Implementation, choose
from retro_jax.kernels.chunked_cross_attention import reference, xla
from retro_jax.kernels.dropout import kept_weights
from retro_jax.kernels.precision import check_operands
from retro_jax.kernels.triton_call import refuses

Name = Literal["reference", "xla", "triton"]


def _triton(*arguments: Any, **keywords: Any) -> jax.Array:
    return import_module("retro_jax.kernels.chunked_cross_attention.triton").chunked_cross_attention(*arguments, **keywords)


IMPLEMENTATIONS = {
    "reference": Implementation(reference.chunked_cross_attention),
    "xla": Implementation(xla.chunked_cross_attention),
    "triton": Implementation(_triton, refuses),
}


def chunked_cross_attention(
    q_BTNH: jax.Array,
    k_BLSGH: jax.Array,
    v_BLSGH: jax.Array,
    key_mask_BLS: jax.Array,
    null_logit_N: jax.Array | None = None,
    *,
    chunk_len: int,
    first_chunk_len: jax.Array | int | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    query_numbers_BTN: jax.Array | None = None,
    implementation: Name | None = None,
) -> jax.Array:
    """Attention of each token to the neighbours of the chunk that ended last at or before it (RETRO, section 2.4).

    With f the row's first chunk length and C the chunk length, token i reads chunk floor((i - f + 1) / C), and nothing
    if i < f - 1.

    Args:
        q_BTNH: one query a token.
        k_BLSGH, v_BLSGH: keys and values of the L chunks' neighbours, S = K * R a chunk, G key/value heads.
        key_mask_BLS: bool, False for padding and absent neighbours.
        null_logit_N: a learned logit a head for attending to nothing.
        chunk_len: C.
        first_chunk_len: int32 [B] in 1..C, or one number for all rows; None: C, and T = L * C. With the number 0, chunk 0 ended
            just before the row's first token: it is the last chunk of the row's part on another device.
        dropout, dropout_key: dropout on the attention weights.
        query_numbers_BTN: uint32, each query's number in the whole batch, which says what is dropped for it; None: its place.
        implementation: a name runs or raises; None takes "xla".

    Returns:
        [B, T, N, H] in q's dtype; 0 with zero gradient for a token that reads no chunk, or a chunk without a valid key.

    Raises:
        ValueError: shapes that do not fit, or an implementation that there is not.
    """
    (B, T, N, H), (Bk, L, S, G, Hk) = q_BTNH.shape, k_BLSGH.shape
    if (B, H) != (Bk, Hk) or k_BLSGH.shape != v_BLSGH.shape or N % G or key_mask_BLS.shape != (B, L, S):
        raise ValueError(
            f"chunked_cross_attention: q {q_BTNH.shape}, k {k_BLSGH.shape}, v {v_BLSGH.shape}, mask {key_mask_BLS.shape} "
            "do not fit [B,T,N,H], [B,L,S,G,H], [B,L,S], N % G == 0"
        )
    check_operands("chunked_cross_attention", q_BTNH, k_BLSGH, v_BLSGH)
    if first_chunk_len is None:
        if T != L * chunk_len:
            raise ValueError(f"chunked_cross_attention: {T} tokens are not {L} chunks of {chunk_len}; give first_chunk_len")
        first_chunk_len = chunk_len
    keep_BTNS = kept_weights("chunked_cross_attention", dropout, dropout_key, query_numbers_BTN, (B, T, N), S)
    run = choose("chunked_cross_attention", IMPLEMENTATIONS, implementation, q_BTNH, k_BLSGH, v_BLSGH)
    return run(
        q_BTNH,
        k_BLSGH,
        v_BLSGH,
        key_mask_BLS,
        null_logit_N,
        chunk_len=chunk_len,
        first_chunk_len=first_chunk_len,
        dropout=dropout,
        keep_BTNS=keep_BTNS,
    )
