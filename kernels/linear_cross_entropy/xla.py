"""Cross-entropy of a linear layer's logits for XLA, chunk by chunk; logits are float32.

The targets' logits are read by themselves, one a token; in the gradient the target is found by comparing with an iota, which
fuses into the pass over the logits that there is anyway, and is no slower on a CPU than a scatter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from retro_jax.kernels.linear_cross_entropy import chunked
from retro_jax.kernels.precision import accumulation_dtype


def _statistics(logits_NV: jax.Array, targets_N: jax.Array) -> chunked.Statistics:
    top_N = logits_NV.max(axis=-1)
    sum_N = jnp.exp(logits_NV - top_N[:, None]).sum(axis=-1)
    near_N1 = jnp.clip(targets_N, 0, logits_NV.shape[1] - 1)[:, None]
    target_N = jnp.take_along_axis(logits_NV, near_N1, axis=-1)[:, 0]
    return chunked.Statistics(top_N, sum_N, jnp.where(near_N1[:, 0] == targets_N, target_N, jnp.zeros_like(target_N)))


def _gradient(
    logits_NV: jax.Array, targets_N: jax.Array, top_N: jax.Array, scale_N: jax.Array, weights_N: jax.Array, dtype: Any
) -> jax.Array:
    is_target_NV = lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1) == targets_N[:, None]
    taken_NV = jnp.where(is_target_NV, weights_N[:, None], jnp.zeros_like(weights_N)[:, None])
    gradient_NV = jnp.exp(logits_NV - top_N[:, None]) * scale_N[:, None] - taken_NV
    return jnp.where(weights_N[:, None] != 0.0, gradient_NV, jnp.zeros_like(gradient_NV)).astype(dtype)


PASSES = chunked.Passes(accumulation_dtype, _statistics, _gradient)
losses = partial(chunked.losses, PASSES)
gradients = partial(chunked.gradients, PASSES)
