"""Cross-entropy over a large vocabulary without ever holding all logits.

Tokens are taken a chunk at a time: logits, loss and (in training) the logits' gradient of one chunk exist, are used and are
dropped. Matrix products take the hidden states' dtype and accumulate in float32; everything else is float32.

Two forms with the same value:

* :func:`weighted_loss` knows each token's weight beforehand, so its forward pass also computes the gradient (3 products of
  N x D x V instead of 4); it keeps ``dhidden`` and ``dtable``, N D + V D numbers in place of N V. Training uses it.
* :func:`token_losses` gives every token's loss; its backward pass computes the logits a second time.

On a mesh the vocabulary is divided over ``tensor``: each device computes the logits of its part for all of its rows' tokens,
and of them only maxima, sums and targets are exchanged, 3 numbers a token. The loss is then known to all of these devices, and
its gradient is counted once.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from retro_jax.parallel.axes import FSDP, TENSOR, axis_index, axis_size
from retro_jax.parallel.collectives import gather_parameter, gather_tokens

FLOAT32 = jnp.float32


def token_losses(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *, chunk: int) -> jax.Array:
    """Cross-entropy of each token: ``logsumexp(table @ hidden) - (table @ hidden)[target]``.

    Args:
        hidden_BTD: float [B, T, D], the decoder's output; on a mesh this device's share of the T tokens.
        table_VD: float, the output table, or this device's part of it; it is cast to the hidden states' dtype.
        targets_BT: int32 ids in [0, V).
        chunk: how many tokens' logits exist at a time.

    Returns:
        float32 [B, T], in nats.
    """
    hidden_ND = gather_tokens(hidden_BTD).reshape(-1, hidden_BTD.shape[-1])
    return _losses(hidden_ND, table_VD, targets_BT.reshape(-1), chunk).reshape(targets_BT.shape)


def weighted_loss(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, chunk: int
) -> jax.Array:
    """The sum of token losses times ``weights_BT``, as a float32 scalar; no gradient flows to the weights.

    Arguments as :func:`token_losses`; ``weights_BT`` is float32.
    """
    hidden_ND = gather_tokens(hidden_BTD).reshape(-1, hidden_BTD.shape[-1])
    return _weighted(hidden_ND, table_VD, targets_BT.reshape(-1), lax.stop_gradient(weights_BT).reshape(-1), chunk)


def _logits(hidden_ND: jax.Array, table_VD: jax.Array) -> jax.Array:
    return lax.dot_general(hidden_ND, table_VD, (((1,), (1,)), ((), ())), preferred_element_type=FLOAT32)


class _Softmax(NamedTuple):
    """Of one chunk of tokens: float32 ``exp_NV`` of the logits here, its sum over the whole vocabulary, and the losses."""

    exp_NV: jax.Array
    sum_N1: jax.Array
    losses_N: jax.Array


def _softmax(logits_NV: jax.Array, targets_N: jax.Array) -> _Softmax:
    """``targets_N`` counts from this device's first row of the table."""
    top_N1 = logits_NV.max(axis=-1, keepdims=True)
    if axis_size(TENSOR) > 1:
        top_N1 = lax.pmax(top_N1, TENSOR)
    exp_NV = jnp.exp(logits_NV - top_N1)
    sum_N1 = exp_NV.sum(axis=-1, keepdims=True)
    target_N1 = jnp.take_along_axis(logits_NV, jnp.clip(targets_N, 0, logits_NV.shape[1] - 1)[:, None], axis=-1)
    if axis_size(TENSOR) > 1:
        target_N1 = jnp.where(_is_here(targets_N, logits_NV)[:, None], target_N1, 0.0)
        sum_N1, target_N1 = lax.psum((sum_N1, target_N1), TENSOR)
    return _Softmax(exp_NV, sum_N1, (jnp.log(sum_N1) + top_N1 - target_N1)[:, 0])


def _is_here(targets_N: jax.Array, logits_NV: jax.Array) -> jax.Array:
    return (targets_N >= 0) & (targets_N < logits_NV.shape[1])


def _chunk_losses(hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array) -> jax.Array:
    return _softmax(_logits(hidden_ND, table_VD), targets_N).losses_N


def _chunk_gradients(
    hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses [N], and the gradients of their weighted sum: dhidden [N, D] in its dtype, dtable [V, D] float32.

    With a divided vocabulary dhidden is what this part contributes; the parts are summed where the hidden states were gathered.
    """
    logits_NV = _logits(hidden_ND, table_VD)
    softmax = _softmax(logits_NV, targets_N)
    gradient_NV = softmax.exp_NV * (weights_N[:, None] / softmax.sum_N1)
    taken_N = weights_N
    if axis_size(TENSOR) > 1:
        taken_N = jnp.where(_is_here(targets_N, logits_NV), weights_N, 0.0)
        targets_N = jnp.clip(targets_N, 0, logits_NV.shape[1] - 1)
    gradient_NV = gradient_NV.at[jnp.arange(targets_N.shape[0]), targets_N].add(-taken_N).astype(hidden_ND.dtype)
    dhidden_ND = lax.dot(gradient_NV, table_VD, preferred_element_type=FLOAT32).astype(hidden_ND.dtype)
    dtable_VD = lax.dot_general(gradient_NV, hidden_ND, (((0,), (0,)), ((), ())), preferred_element_type=FLOAT32)
    return softmax.losses_N, dhidden_ND, dtable_VD


def _here(table_VD: jax.Array, targets_N: jax.Array, hidden_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
    """This device's rows of the table, of whole width and in the hidden states' dtype; targets counted from its first row."""
    table = table_VD.astype(hidden_ND.dtype)
    if table.shape[1] != hidden_ND.shape[1]:
        table = gather_parameter(table, 1)
    return table, targets_N - axis_index(TENSOR) * table.shape[0]


def _own_width(dtable_VD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """The gradient of what this device holds of the table: summed over ``fsdp`` where that divides its width."""
    if table_VD.shape[1] != dtable_VD.shape[1]:
        dtable_VD = lax.psum_scatter(dtable_VD, FSDP, scatter_dimension=1, tiled=True)
    return dtable_VD.astype(table_VD.dtype)


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


def _losses_and_gradients(
    hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """:func:`_chunk_gradients` over all tokens, chunk by chunk; dtable is summed in float32 and cast to the table's dtype."""
    table, targets_N = _here(table_VD, targets_N, hidden_ND)
    count = targets_N.shape[0]
    if count <= chunk:
        losses_N, dhidden_ND, dtable_VD = _chunk_gradients(hidden_ND, table, targets_N, weights_N)
        return losses_N, dhidden_ND, _own_width(dtable_VD, table_VD)

    def step(dtable_VD: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden, targets, weights = piece
        losses, dhidden, dtable = _chunk_gradients(hidden, table, targets, weights)
        return dtable_VD + dtable, (losses, dhidden)

    pieces = tuple(_split(array, chunk) for array in (hidden_ND, targets_N, weights_N))
    dtable_VD, (losses, dhidden) = lax.scan(step, jnp.zeros(table.shape, FLOAT32), pieces)
    return _join(losses, count), _join(dhidden, count), _own_width(dtable_VD, table_VD)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, chunk: int) -> jax.Array:
    table, targets_N = _here(table_VD, targets_N, hidden_ND)
    if targets_N.shape[0] <= chunk:
        return _chunk_losses(hidden_ND, table, targets_N)
    losses = lax.map(lambda piece: _chunk_losses(piece[0], table, piece[1]), (_split(hidden_ND, chunk), _split(targets_N, chunk)))
    return _join(losses, targets_N.shape[0])


def _losses_forward(hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, chunk: int) -> tuple:
    return _losses(hidden_ND, table_VD, targets_N, chunk), (hidden_ND, table_VD, targets_N)


def _losses_backward(chunk: int, residuals: tuple, cotangent_N: jax.Array) -> tuple:
    hidden_ND, table_VD, targets_N = residuals
    _, dhidden_ND, dtable_VD = _losses_and_gradients(hidden_ND, table_VD, targets_N, cotangent_N, chunk)
    return dhidden_ND, dtable_VD, None


_losses.defvjp(_losses_forward, _losses_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted(hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array, chunk: int) -> jax.Array:
    return jnp.sum(_losses(hidden_ND, table_VD, targets_N, chunk) * weights_N)


def _weighted_forward(hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array, chunk: int) -> tuple:
    losses_N, dhidden_ND, dtable_VD = _losses_and_gradients(hidden_ND, table_VD, targets_N, weights_N, chunk)
    return jnp.sum(losses_N * weights_N), (dhidden_ND, dtable_VD)


def _weighted_backward(chunk: int, residuals: tuple, cotangent: ArrayLike) -> tuple:
    dhidden_ND, dtable_VD = residuals
    scaled = [(gradient.astype(FLOAT32) * cotangent).astype(gradient.dtype) for gradient in (dhidden_ND, dtable_VD)]
    return scaled[0], scaled[1], None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)
