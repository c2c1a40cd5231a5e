"""The loss of a batch from the decoder's output: :mod:`retro_jax.kernels.linear_cross_entropy` on a mesh.

On a mesh the vocabulary is divided over ``tensor``: each device computes the logits of its part for all of its rows' tokens,
and of them only maxima, sums and targets are exchanged, 3 numbers a token. The loss is then known to all of these devices, and
its gradient is counted once. A table whose width is divided over ``fsdp`` is gathered for the loss, and what is kept of its
gradient is the own part.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import lax

from retro_jax.config import Implementation
from retro_jax.kernels import linear_cross_entropy
from retro_jax.parallel.axes import TENSOR, axis_size
from retro_jax.parallel.collectives import gather_parameter, gather_tokens, sum_into_shard


def token_losses(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    chunk: int,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Cross-entropy of each token: ``logsumexp(table @ hidden) - (table @ hidden)[target]``.

    Args:
        hidden_BTD: float [B, T, D], the decoder's output; on a mesh this device's share of the T tokens.
        table_VD: float, the output table, or this device's part of it; it is cast to the hidden states' dtype.
        targets_BT: int32 ids in [0, V); the loss of a negative one is 0.
        chunk: how many tokens' logits exist at a time.
        implementation: of :mod:`retro_jax.kernels.linear_cross_entropy`.

    Returns:
        float32 [B, T], in nats.
    """
    hidden_ND = _all_tokens(hidden_BTD)
    table = _whole_width(table_VD, hidden_ND)
    losses_N = linear_cross_entropy.token_losses(
        hidden_ND, table, targets_BT.reshape(-1), chunk=chunk, axis=_vocabulary_axis(), implementation=implementation
    )
    return losses_N.reshape(targets_BT.shape)


def weighted_loss(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The sum of (token losses + ``z_loss`` logsumexp^2) times ``weights_BT``, as a float32 scalar; no gradient flows to the
    weights.

    Arguments as :func:`token_losses`; ``weights_BT`` is float32.
    """
    return loss_and_cross_entropy(
        hidden_BTD, table_VD, targets_BT, weights_BT, chunk=chunk, z_loss=z_loss, implementation=implementation
    )[0]


def loss_and_cross_entropy(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`weighted_loss`, and beside it the sum without the z-loss, to be reported: no gradient flows through it."""
    hidden_ND, targets_N, weights_N = _all_tokens(hidden_BTD), targets_BT.reshape(-1), lax.stop_gradient(weights_BT).reshape(-1)
    if table_VD.shape[1] == hidden_ND.shape[1]:
        return linear_cross_entropy.loss_and_cross_entropy(
            hidden_ND,
            table_VD,
            targets_N,
            weights_N,
            chunk=chunk,
            z_loss=z_loss,
            axis=_vocabulary_axis(),
            implementation=implementation,
        )
    loss, cross_entropy = _with_shard(hidden_ND, table_VD, targets_N, weights_N, chunk, z_loss, implementation)
    return loss, lax.stop_gradient(cross_entropy)


def _all_tokens(hidden_BTD: jax.Array) -> jax.Array:
    return gather_tokens(hidden_BTD).reshape(-1, hidden_BTD.shape[-1])


def _vocabulary_axis() -> str | None:
    return TENSOR if axis_size(TENSOR) > 1 else None


def _whole_width(table_VD: jax.Array, hidden_ND: jax.Array) -> jax.Array:
    """This device's rows of the table; those of which it holds a part, in the hidden states' dtype: (f - 1) / f of them."""
    return table_VD if table_VD.shape[1] == hidden_ND.shape[1] else gather_parameter(table_VD.astype(hidden_ND.dtype), 1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _with_shard(
    hidden_ND: jax.Array,
    shard_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    chunk: int,
    z_loss: float,
    implementation: Implementation | None,
) -> tuple[jax.Array, jax.Array]:
    """With a part of the table's width; its gradient is summed over ``fsdp`` in float32 before it is kept."""
    return linear_cross_entropy.loss_and_cross_entropy(
        hidden_ND,
        _whole_width(shard_VD, hidden_ND),
        targets_N,
        weights_N,
        chunk=chunk,
        z_loss=z_loss,
        axis=_vocabulary_axis(),
        implementation=implementation,
    )


def _with_shard_forward(
    hidden_ND: jax.Array,
    shard_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    chunk: int,
    z_loss: float,
    implementation: Implementation | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    losses, (dhidden_ND, dtable_VD) = linear_cross_entropy.gradients(
        hidden_ND,
        _whole_width(shard_VD, hidden_ND),
        targets_N,
        weights_N,
        chunk=chunk,
        z_loss=z_loss,
        axis=_vocabulary_axis(),
        implementation=implementation,
    )
    return losses, (dhidden_ND, sum_into_shard(dtable_VD, 1).astype(shard_VD.dtype))


def _with_shard_backward(
    chunk: int,
    z_loss: float,
    implementation: Implementation | None,
    kept: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple:
    return *linear_cross_entropy.scaled(kept, cotangents[0]), None, None


_with_shard.defvjp(_with_shard_forward, _with_shard_backward)
