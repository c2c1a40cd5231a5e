"""Everything that devices send each other inside the model, by what it means there.

Each is a linear map whose transpose is its counterpart, so that the backward pass sends what the forward pass gathered back
as sums, and the other way round: gather <-> sum into parts, hand on <-> hand back. None of them is a plain all-reduce: under
``shard_map(check_vma=False)`` the transpose of ``psum`` would count a sum once a device.

Bytes are those that a device receives, for a local array of n bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from retro_jax.parallel.axes import FSDP, SEQUENCE, TENSOR, axis_index, axis_size

Result = TypeVar("Result")


def gather_tokens(x_XTD: jax.Array, dim: int = 1) -> jax.Array:
    """All tokens of this device's rows, from the shares that the devices along ``tensor`` hold: (t - 1) n bytes."""
    return _gather(x_XTD, TENSOR, dim)


def sum_into_own_tokens(y_XTD: jax.Array, dim: int = 1) -> jax.Array:
    """The sum over ``tensor`` of what each device computed for all tokens, of its own share of them: (t - 1) / t n bytes."""
    if axis_size(TENSOR) == 1:
        return y_XTD
    return lax.psum_scatter(y_XTD, TENSOR, scatter_dimension=dim, tiled=True)


def own_tokens(x_XT: jax.Array, dim: int = 1) -> jax.Array:
    """This device's share along ``tensor`` of something that all of them have; nothing is sent."""
    return _own(x_XT, TENSOR, dim)


def gather_row(x_BT: jax.Array, dim: int = 1) -> jax.Array:
    """Whole rows, from the parts that the devices along ``sequence`` hold: (s - 1) n bytes."""
    return _gather(x_BT, SEQUENCE, dim)


def own_part(x_BT: jax.Array, dim: int = 1) -> jax.Array:
    """This device's part along ``sequence`` of something that all of them have; nothing is sent."""
    return _own(x_BT, SEQUENCE, dim)


def from_part_before(x: jax.Array) -> jax.Array:
    """``x`` of the device before this one along ``sequence``, zeros on the first: n bytes."""
    parts = axis_size(SEQUENCE)
    if parts == 1:
        return jnp.zeros_like(x)
    return lax.ppermute(x, SEQUENCE, [(part, part + 1) for part in range(parts - 1)])


def gather_parameter(shard: jax.Array, dim: int, axis: str = FSDP) -> jax.Array:
    """A whole parameter from the shards along ``fsdp``, or another axis: (f - 1) n bytes."""
    return _gather(shard, axis, dim)


def sum_into_shard(gradient: jax.Array, dim: int) -> jax.Array:
    """The sum over ``fsdp`` of a whole parameter's gradients, of this device's shard: (f - 1) / f n bytes."""
    return gradient if axis_size(FSDP) == 1 else lax.psum_scatter(gradient, FSDP, scatter_dimension=dim, tiled=True)


def gathered_again(compute: Callable[..., Result], again: bool = True) -> Callable[..., Result]:
    """``compute``, with ``again`` keeping nothing of what it gathers for the backward pass, which gathers it again.

    Around a gather and the matrix product that reads it, this keeps the share that was given in place of the whole; the product
    itself is not computed a second time, for its gradient does not need its result.
    """
    if not again or axis_size(TENSOR) == axis_size(FSDP) == 1:
        return compute
    return jax.checkpoint(compute, policy=jax.checkpoint_policies.nothing_saveable)


def _gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    return x if axis_size(axis) == 1 else lax.all_gather(x, axis, axis=dim, tiled=True)


def _own(x: jax.Array, axis: str, dim: int) -> jax.Array:
    parts = axis_size(axis)
    if parts == 1:
        return x
    length = x.shape[dim] // parts
    return lax.dynamic_slice_in_dim(x, axis_index(axis) * length, length, dim)
