"""Masked softmax attention: checks and choice of implementation."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import jax

from retro_jax.kernels.attention import cudnn, reference, xla
from retro_jax.kernels.attention.masks import CausalMask, Mask
from retro_jax.kernels.choice import Implementation, choose
from retro_jax.kernels.dropout import kept_weights
from retro_jax.kernels.precision import check_operands
from retro_jax.kernels.triton_call import refuses

Name = Literal["reference", "xla", "triton", "cudnn"]


def _triton(*arguments: Any, **keywords: Any) -> jax.Array:
    return import_module("retro_jax.kernels.attention.triton").attention(*arguments, **keywords)


def _triton_refuses(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask | None, null_logit: jax.Array | None, *, dropout: float, **_: Any
) -> str | None:
    if isinstance(mask, CausalMask) and (dropout or null_logit is not None):
        return "dropout of weights and a null logit are not in its causal kernels"
    return refuses(q, k, v)


IMPLEMENTATIONS = {
    "reference": Implementation(reference.attention),
    "xla": Implementation(xla.attention),
    "triton": Implementation(_triton, _triton_refuses),
    "cudnn": Implementation(cudnn.attention, cudnn.refuses),
}


def attention(
    q_XQNH: jax.Array,
    k_XSGH: jax.Array,
    v_XSGH: jax.Array,
    mask: Mask | None = None,
    null_logit_N: jax.Array | None = None,
    *,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    query_numbers_XQN: jax.Array | None = None,
    name: str = "attention",
    implementation: Name | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v for each of X independent problems; accumulation is float32.

    Args:
        q_XQNH: queries, Q a problem, N heads.
        k_XSGH, v_XSGH: keys and values, S a problem, G heads; N is a multiple of G (grouped-query attention).
        mask: which keys a query sees; None: all.
        null_logit_N: a learned logit a head for attending to nothing (a key whose value is zero).
        dropout, dropout_key: dropout on the attention weights; the key is needed when the share is above 0.
        query_numbers_XQN: uint32, each query's number in the whole batch, which says what is dropped for it; None: its place.
        name: of what is saved for the backward pass, ``<name>_out`` and ``<name>_lse`` to ``jax.checkpoint``.
        implementation: a name runs or raises; None takes "xla".

    Returns:
        [X, Q, N, H] in q's dtype. A query that sees no key gets 0 and zero gradient.

    Raises:
        ValueError: shapes that do not fit, or an implementation that there is not.
    """
    (X, Q, N, H), (Xk, S, G, Hk) = q_XQNH.shape, k_XSGH.shape
    if (X, H) != (Xk, Hk) or k_XSGH.shape != v_XSGH.shape or N % G:
        raise ValueError(
            f"attention: q {q_XQNH.shape}, k {k_XSGH.shape}, v {v_XSGH.shape} do not fit "
            "[X,Q,N,H], [X,S,G,H], [X,S,G,H] with N a multiple of G"
        )
    check_operands("attention", q_XQNH, k_XSGH, v_XSGH)
    if mask is not None:
        mask.check(X, Q, S)
    keep_XQNS = kept_weights("attention", dropout, dropout_key, query_numbers_XQN, (X, Q, N), S)
    keep_XNQS = None if keep_XQNS is None else keep_XQNS.swapaxes(1, 2)
    operands = (q_XQNH, k_XSGH, v_XSGH, mask, null_logit_N)
    run = choose("attention", IMPLEMENTATIONS, implementation, *operands, dropout=dropout)
    return run(*operands, dropout=dropout, keep_XNQS=keep_XNQS, name=name)
