"""Cross-entropy of a linear layer's logits for GPUs: what is done to one chunk's logits z, in one pass each.

1. Statistics: top = max z, sum = exp(z - top) summed, and the target's logit, by an online softmax (Milakov & Gimelshein 2018,
   arXiv:1805.02867): each lane keeps a maximum and a sum of its own, with one exponential a logit, and lanes meet once a row.
2. Gradient: dz = exp(z - top) scale - weight at the target, written over the logits.

Products are XLA's, and logits the float32 sums that they make. Liger (arXiv:2410.10989) rounds them to bfloat16, which halves
their memory and makes 6 bytes of traffic a logit of 10; but for logits of deviation 1 a token's loss is then 2e-3 off (root mean
square), and for logits of deviation 4, as trained models have, 1.4e-2, with dtable 5.4e-3 of its norm off in place of 6e-4. The
gradient is written over the logits where its dtype is theirs, else beside them.

Nothing is in shared memory but the warps' meeting, a number each. Either pass does about 10 operations a logit, so the memory
sets its pace, beside the products' 6 D operations a logit.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from retro_jax.kernels.linear_cross_entropy import chunked
from retro_jax.kernels.triton_call import call

# Logits that a program takes at a time, and its warps: 16 logits a thread, two loads of 16 bytes in bfloat16.
BLOCK = 4096
WARPS = 8

# A lane's first maximum: finite, so that its difference from a logit of -inf, which stands past the end, is not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def cross_entropy_statistics(logits, targets, tops, sums, target_logits, V: tl.constexpr, BLOCK: tl.constexpr):
    """Of row ``program_id(0)`` of ``logits``, any float dtype; results are float32. A target outside of [0, V) has logit 0."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(logits + row * V + start + lanes, mask=start + lanes < V, other=-float("inf")).to(tl.float32)
        above = z - top
        ratio = tl.exp(-tl.abs(above))
        total = tl.where(above > 0.0, total * ratio + 1.0, total + ratio)
        top = tl.maximum(top, z)
    row_top = tl.max(top, axis=0)
    target = tl.load(targets + row)
    is_here = (target >= 0) & (target < V)
    tl.store(tops + row, row_top)
    tl.store(sums + row, tl.sum(total * tl.exp(top - row_top), axis=0))
    tl.store(target_logits + row, tl.load(logits + row * V + target, mask=is_here, other=0.0).to(tl.float32))


@triton.jit
def cross_entropy_gradient(logits, targets, tops, scales, weights, gradients, V: tl.constexpr, BLOCK: tl.constexpr):
    """Of row ``program_id(0)``, block ``program_id(1)``: exp(z - top) scale - weight at the target; 0 where the weight is 0.

    ``gradients`` may be ``logits``: a program writes what it alone has read.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    weight = tl.load(weights + row)
    gradient = tl.zeros([BLOCK], tl.float32)
    if weight != 0.0:
        z = tl.load(logits + row * V + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(z - tl.load(tops + row)) * tl.load(scales + row)
        gradient = tl.where(columns == tl.load(targets + row), gradient - weight, gradient)
    tl.store(gradients + row * V + columns, gradient.to(gradients.dtype.element_ty), mask=inside)


def _logits_dtype(dtype: Any) -> Any:
    """Of the logits, for hidden states of ``dtype``."""
    return jnp.float32


def _statistics(logits_NV: jax.Array, targets_N: jax.Array) -> chunked.Statistics:
    N, V = logits_NV.shape
    each = jax.ShapeDtypeStruct((N,), jnp.float32)
    block = min(BLOCK, triton.next_power_of_2(V))
    results = call(
        cross_entropy_statistics, logits_NV, targets_N, outputs=(each, each, each), grid=(N,), num_warps=WARPS, V=V, BLOCK=block
    )
    return chunked.Statistics(*results)


def _gradient(
    logits_NV: jax.Array, targets_N: jax.Array, top_N: jax.Array, scale_N: jax.Array, weights_N: jax.Array, dtype: Any
) -> jax.Array:
    N, V = logits_NV.shape
    block = min(BLOCK, triton.next_power_of_2(V))
    (gradient_NV,) = call(
        cross_entropy_gradient,
        logits_NV,
        targets_N,
        top_N,
        scale_N,
        weights_N,
        outputs=(jax.ShapeDtypeStruct((N, V), dtype),),
        grid=(N, triton.cdiv(V, block)),
        aliases={0: 0} if dtype == logits_NV.dtype else None,
        num_warps=WARPS,
        V=V,
        BLOCK=block,
    )
    return gradient_NV


PASSES = chunked.Passes(_logits_dtype, _statistics, _gradient)
losses = partial(chunked.losses, PASSES)
gradients = partial(chunked.gradients, PASSES)
