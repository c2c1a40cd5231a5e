"""Cross-entropy of a linear layer's logits in plain float32 (or wider) JAX, all logits at once: what the others are held against.

With p = softmax(z) and the loss w (lse - z[y] + z_loss lse^2):  dz = w (p (1 + 2 z_loss lse) - onehot(y)).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from retro_jax.kernels.precision import accumulation_dtype


def losses(
    hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, *, chunk: int, axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and logsumexp of each token, both [N]; ``targets_N`` counts from this part's first row of the table."""
    cross_entropy_N, lse_N, _, _ = _softmax(hidden_ND, table_VD, targets_N, axis)
    return cross_entropy_N, lse_N


def gradients(
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    *,
    chunk: int,
    z_loss: float,
    axis: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """:func:`losses`, dhidden [N, D] in the hidden states' dtype, dtable [V, D] in float32 (or wider)."""
    cross_entropy_N, lse_N, softmax_NV, onehot_NV = _softmax(hidden_ND, table_VD, targets_N, axis)
    gradient_NV = weights_N[:, None] * (softmax_NV * (1.0 + 2.0 * z_loss * lse_N)[:, None] - onehot_NV)
    wide = accumulation_dtype(hidden_ND.dtype)
    dhidden_ND = jnp.einsum("nv,vd->nd", gradient_NV, table_VD.astype(hidden_ND.dtype).astype(wide), precision="highest")
    dtable_VD = jnp.einsum("nv,nd->vd", gradient_NV, hidden_ND.astype(wide), precision="highest")
    return cross_entropy_N, lse_N, dhidden_ND.astype(hidden_ND.dtype), dtable_VD


def _softmax(
    hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cross-entropy, logsumexp, softmax, and where the target stands."""
    wide = accumulation_dtype(hidden_ND.dtype)
    table = table_VD.astype(hidden_ND.dtype).astype(wide)
    logits_NV = jnp.einsum("nd,vd->nv", hidden_ND.astype(wide), table, precision="highest")
    onehot_NV = jnp.arange(table.shape[0], dtype=jnp.int32)[None, :] == targets_N[:, None]
    top_N = logits_NV.max(-1)
    top_N = top_N if axis is None else lax.pmax(top_N, axis)
    exp_NV = jnp.exp(logits_NV - top_N[:, None])
    sum_N, target_N = exp_NV.sum(-1), jnp.where(onehot_NV, logits_NV, 0.0).sum(-1)
    if axis is not None:
        sum_N, target_N = lax.psum((sum_N, target_N), axis)
    lse_N = jnp.log(sum_N) + top_N
    return lse_N - target_N, lse_N, exp_NV / sum_N[:, None], onehot_NV.astype(wide)
