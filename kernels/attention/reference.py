"""Masked softmax attention in plain float32 (or wider) JAX: what the other implementations are held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from retro_jax.kernels.attention.masks import Mask
from retro_jax.kernels.precision import accumulation_dtype


def attention(
    q_XQNH: jax.Array,
    k_XSGH: jax.Array,
    v_XSGH: jax.Array,
    mask: Mask | None,
    null_logit_N: jax.Array | None,
    *,
    dropout: float = 0.0,
    keep_XNQS: jax.Array | None = None,
    name: str = "attention",
) -> jax.Array:
    """See :func:`retro_jax.kernels.attention.attention`."""
    wide = accumulation_dtype(q_XQNH.dtype)
    N, H, G = q_XQNH.shape[2], q_XQNH.shape[3], k_XSGH.shape[2]
    q = q_XQNH.astype(wide)
    k = jnp.repeat(k_XSGH.astype(wide), N // G, axis=2)
    v = jnp.repeat(v_XSGH.astype(wide), N // G, axis=2)
    scores_XNQS = jnp.einsum("xqnh,xsnh->xnqs", q, k, precision="highest") / H**0.5
    mask_XQS = jnp.ones((1, 1, 1), bool) if mask is None else mask.dense()
    mask_XNQS = jnp.broadcast_to(mask_XQS[:, None], scores_XNQS.shape)
    scores_XNQS = jnp.where(mask_XNQS, scores_XNQS, -jnp.inf)
    peak = scores_XNQS.max(-1, keepdims=True)
    if null_logit_N is not None:
        null_XNQ1 = jnp.broadcast_to(null_logit_N.astype(wide)[None, :, None, None], peak.shape)
        peak = jnp.maximum(peak, null_XNQ1)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0.0))
    weights = jnp.where(mask_XNQS, jnp.exp(scores_XNQS - peak), 0.0)
    total = weights.sum(-1, keepdims=True)
    if null_logit_N is not None:
        total = total + jnp.exp(null_XNQ1 - peak)
    weights = weights / jnp.where(total > 0.0, total, 1.0)
    if keep_XNQS is not None:
        weights = jnp.where(keep_XNQS, weights / (1.0 - dropout), 0.0)
    o = jnp.einsum("xnqs,xsnh->xqnh", weights, v, precision="highest").astype(q_XQNH.dtype)
    return checkpoint_name(o, f"{name}_out")
