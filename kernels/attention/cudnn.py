"""Attention by cuDNN, through ``jax.nn.dot_product_attention``.

It is told of segments and of key masks by a mask of Q x S a problem, which is in memory as numbers of the operands' dtype;
Triton's kernels need none. What it keeps for the backward pass has no name, so that a policy by names computes it again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from retro_jax.kernels.attention.masks import CausalMask, Mask
from retro_jax.kernels.choice import runs_on_gpu


def refuses(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask | None, null_logit: jax.Array | None, *, dropout: float, **_: Any
) -> str | None:
    """Why cuDNN cannot run this; None where it can."""
    width = q.shape[-1]
    if not runs_on_gpu():
        return "it needs a GPU"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"its dtype is {q.dtype}, not float16 or bfloat16"
    if width % 8 or width > 128:
        return f"head_dim={width} is not a multiple of 8 up to 128"
    if dropout or null_logit is not None:
        return "it has neither our dropout of weights nor a null logit"
    return None


def attention(
    q_XQNH: jax.Array,
    k_XSGH: jax.Array,
    v_XSGH: jax.Array,
    mask: Mask | None,
    null_logit_N: None,
    *,
    dropout: float = 0.0,
    keep_XNQS: None = None,
    name: str = "attention",
) -> jax.Array:
    """See :func:`retro_jax.kernels.attention.attention`."""
    Q, S = q_XQNH.shape[1], k_XSGH.shape[1]
    causal = isinstance(mask, CausalMask) and mask.first is None and Q == S  # skips what is above the diagonal
    seen_XQS = None if mask is None else jnp.broadcast_to(mask.dense(), (q_XQNH.shape[0], Q, S))
    o_XQNH = jax.nn.dot_product_attention(
        q_XQNH,
        k_XSGH,
        v_XSGH,
        mask=None if seen_XQS is None else seen_XQS[:, None],
        is_causal=causal,
        implementation="cudnn",
    )
    if seen_XQS is not None:
        o_XQNH = jnp.where(seen_XQS.any(2)[:, :, None, None], o_XQNH, jnp.zeros_like(o_XQNH))
    return checkpoint_name(o_XQNH, f"{name}_out")
