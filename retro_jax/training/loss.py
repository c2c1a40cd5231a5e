"""Cross-entropy over a large vocabulary without ever holding all logits.

Tokens are taken a chunk at a time: logits, loss and (in training) the logits' gradient of one chunk exist, are used and are
dropped. Matrix products take the hidden states' dtype and accumulate in float32; everything else is float32.

Two forms with the same value:

* :func:`weighted_loss` knows each token's weight beforehand, so its forward pass also computes the gradient (3 products of
  N x D x V instead of 4); it keeps ``dhidden`` and ``dtable``, N D + V D numbers in place of N V. Training uses it.
* :func:`token_losses` gives every token's loss; its backward pass computes the logits a second time.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

FLOAT32 = jnp.float32


def token_losses(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *, chunk: int) -> jax.Array:
    """Cross-entropy of each token: ``logsumexp(table @ hidden) - (table @ hidden)[target]``.

    Args:
        hidden_BTD: float, the decoder's output; any leading dims.
        table_VD: float, the output table; it is cast to the hidden states' dtype.
        targets_BT: int32 ids in [0, V).
        chunk: how many tokens' logits exist at a time.

    Returns:
        float32 [B, T], in nats.
    """
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    return _losses(hidden_ND, table_VD, targets_BT.reshape(-1), chunk).reshape(targets_BT.shape)


def weighted_loss(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, chunk: int
) -> jax.Array:
    """The sum of token losses times ``weights_BT``, as a float32 scalar; no gradient flows to the weights.

    Arguments as :func:`token_losses`; ``weights_BT`` is float32.
    """
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    return _weighted(hidden_ND, table_VD, targets_BT.reshape(-1), lax.stop_gradient(weights_BT).reshape(-1), chunk)


def _logits(hidden_ND: jax.Array, table_VD: jax.Array) -> jax.Array:
    return lax.dot_general(hidden_ND, table_VD, (((1,), (1,)), ((), ())), preferred_element_type=FLOAT32)


def _chunk_losses(hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array) -> jax.Array:
    logits_NV = _logits(hidden_ND, table_VD)
    top_N1 = logits_NV.max(axis=-1, keepdims=True)
    total_N = jnp.log(jnp.exp(logits_NV - top_N1).sum(axis=-1)) + top_N1[:, 0]
    return total_N - jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]


def _chunk_gradients(
    hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses [N], and the gradients of their weighted sum: dhidden [N, D] in its dtype, dtable [V, D] float32."""
    logits_NV = _logits(hidden_ND, table_VD)
    top_N1 = logits_NV.max(axis=-1, keepdims=True)
    exp_NV = jnp.exp(logits_NV - top_N1)
    sum_N1 = exp_NV.sum(axis=-1, keepdims=True)
    target_N1 = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)
    losses_N = (jnp.log(sum_N1) + top_N1 - target_N1)[:, 0]
    gradient_NV = exp_NV * (weights_N[:, None] / sum_N1)
    gradient_NV = gradient_NV.at[jnp.arange(targets_N.shape[0]), targets_N].add(-weights_N).astype(hidden_ND.dtype)
    dhidden_ND = lax.dot(gradient_NV, table_VD, preferred_element_type=FLOAT32).astype(hidden_ND.dtype)
    dtable_VD = lax.dot_general(gradient_NV, hidden_ND, (((0,), (0,)), ((), ())), preferred_element_type=FLOAT32)
    return losses_N, dhidden_ND, dtable_VD


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
    table = table_VD.astype(hidden_ND.dtype)
    count = targets_N.shape[0]
    if count <= chunk:
        losses_N, dhidden_ND, dtable_VD = _chunk_gradients(hidden_ND, table, targets_N, weights_N)
        return losses_N, dhidden_ND, dtable_VD.astype(table_VD.dtype)

    def step(dtable_VD: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden, targets, weights = piece
        losses, dhidden, dtable = _chunk_gradients(hidden, table, targets, weights)
        return dtable_VD + dtable, (losses, dhidden)

    pieces = tuple(_split(array, chunk) for array in (hidden_ND, targets_N, weights_N))
    dtable_VD, (losses, dhidden) = lax.scan(step, jnp.zeros(table_VD.shape, FLOAT32), pieces)
    return _join(losses, count), _join(dhidden, count), dtable_VD.astype(table_VD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, chunk: int) -> jax.Array:
    table = table_VD.astype(hidden_ND.dtype)
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
