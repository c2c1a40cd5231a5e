"""The loop over chunks of tokens: logits of one chunk, their statistics and, in training, their gradient exist at a time.

What is done to a chunk's logits is an implementation's (:class:`Passes`); products, sums over chunks and what devices with
parts of the vocabulary tell each other are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from retro_jax.kernels.precision import accumulation_dtype


class Statistics(NamedTuple):
    """Of each token's logits, float32 [N]: the largest one, the sum of exp(logit - top), the target's logit (0 if not here)."""

    top_N: jax.Array
    sum_N: jax.Array
    target_N: jax.Array


class Passes(NamedTuple):
    """The passes over one chunk's logits.

    ``logits_dtype``: (hidden dtype) -> dtype. ``statistics``: (logits_NV, targets_N) -> :class:`Statistics` of this part of the
    vocabulary. ``gradient``: (logits_NV, targets_N, top_N, scale_N, weights_N, dtype) -> exp(logits - top) scale - weight at the
    target, in that dtype, exactly 0 in rows of weight 0; the logits are not needed afterwards.
    """

    logits_dtype: Callable[[Any], Any]
    statistics: Callable[[jax.Array, jax.Array], Statistics]
    gradient: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, Any], jax.Array]


def losses(
    passes: Passes, hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, *, chunk: int, axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and logsumexp of each token, float32 [N]."""
    table = table_VD.astype(hidden_ND.dtype)

    def of_chunk(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = piece
        return _losses(_whole(passes.statistics(_logits(passes, hidden, table), targets), axis))

    count = targets_N.shape[0]
    if count <= chunk:
        return of_chunk((hidden_ND, targets_N))
    cross_entropy, lse = lax.map(of_chunk, (_split(hidden_ND, chunk), _split(targets_N, chunk)))
    return _join(cross_entropy, count), _join(lse, count)


def gradients(
    passes: Passes,
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    *,
    chunk: int,
    z_loss: float,
    axis: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """:func:`losses`, dhidden [N, D] in the hidden states' dtype, and dtable [V, D] summed over chunks in float32."""
    table = table_VD.astype(hidden_ND.dtype)
    count = targets_N.shape[0]
    if count <= chunk:
        return _chunk_gradients(passes, hidden_ND, table, targets_N, weights_N, z_loss, axis)

    def step(dtable_VD: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        hidden, targets, weights = piece
        *results, dtable = _chunk_gradients(passes, hidden, table, targets, weights, z_loss, axis)
        return dtable_VD + dtable, tuple(results)

    pieces = tuple(_split(array, chunk) for array in (hidden_ND, targets_N, weights_N))  # what is added has weight 0
    nothing = jnp.zeros(table.shape, accumulation_dtype(hidden_ND.dtype))
    dtable_VD, (cross_entropy, lse, dhidden) = lax.scan(step, nothing, pieces)
    return _join(cross_entropy, count), _join(lse, count), _join(dhidden, count), dtable_VD


def _chunk_gradients(
    passes: Passes,
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    z_loss: float,
    axis: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    logits_NV = _logits(passes, hidden_ND, table_VD)
    statistics = _whole(passes.statistics(logits_NV, targets_N), axis)
    cross_entropy_N, lse_N = _losses(statistics)
    scale_N = weights_N / statistics.sum_N
    if z_loss:
        scale_N = scale_N * (1.0 + 2.0 * z_loss * lse_N)
    gradient_NV = passes.gradient(logits_NV, targets_N, statistics.top_N, scale_N, weights_N, hidden_ND.dtype)
    wide = accumulation_dtype(hidden_ND.dtype)
    dhidden_ND = lax.dot(gradient_NV, table_VD, preferred_element_type=wide).astype(hidden_ND.dtype)
    dtable_VD = lax.dot_general(gradient_NV, hidden_ND, (((0,), (0,)), ((), ())), preferred_element_type=wide)
    return cross_entropy_N, lse_N, dhidden_ND, dtable_VD


def _logits(passes: Passes, hidden_ND: jax.Array, table_VD: jax.Array) -> jax.Array:
    dtype = passes.logits_dtype(hidden_ND.dtype)
    return lax.dot_general(hidden_ND, table_VD, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _whole(part: Statistics, axis: str | None) -> Statistics:
    """Of the whole vocabulary: a maximum and two sums a token over the axis that divides it."""
    if axis is None:
        return part
    top_N = lax.pmax(part.top_N, axis)
    sum_N, target_N = lax.psum((part.sum_N * jnp.exp(part.top_N - top_N), part.target_N), axis)
    return Statistics(top_N, sum_N, target_N)


def _losses(statistics: Statistics) -> tuple[jax.Array, jax.Array]:
    lse_N = jnp.log(statistics.sum_N) + statistics.top_N
    return lse_N - statistics.target_N, lse_N


def _chunks(count: int, chunk: int) -> tuple[int, int]:
    """How many chunks, and how long each, for ``count`` tokens in chunks of at most ``chunk``, as even as can be."""
    pieces = -(-count // chunk)
    return pieces, -(-count // pieces)


def _split(array: jax.Array, chunk: int) -> jax.Array:
    """[N, ...] -> [pieces, length, ...], padded with zeros."""
    pieces, length = _chunks(array.shape[0], chunk)
    padding = [(0, pieces * length - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    if padding[0][1]:
        array = jnp.pad(array, padding)
    return array.reshape(pieces, length, *array.shape[1:])


def _join(array: jax.Array, count: int) -> jax.Array:
    return array.reshape(-1, *array.shape[2:])[:count]
