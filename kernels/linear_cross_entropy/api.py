"""Cross-entropy of a linear layer's logits: checks, choice of implementation, what the backward pass keeps.

With z = table @ hidden of a token, lse = logsumexp(z), target y and weight w, its loss is w (lse - z[y] + z_loss lse^2).

* :func:`weighted_loss` knows the weights beforehand, so its forward pass computes the gradient too (3 products of N x D x V in
  place of 4); it keeps N D + V D numbers in place of N V. Training uses it.
* :func:`token_losses` gives every token's loss; its backward pass computes the logits a second time.

A token whose target is negative, or whose weight is 0, is masked: it adds nothing to the loss and gets exactly zero gradient,
whatever its logits are. A target of V or more is an error that a compiled program can't raise: its loss is NaN.

``axis`` names the mesh axis of a surrounding ``jax.shard_map(check_vma=False)`` over which the vocabulary is divided: V is what
one device has, the one at place i from row i V on; all of them have the same tokens and exchange 3 numbers a token. The loss is
known to all of them; ``dtable`` is that of the own rows, and ``dhidden`` what the own rows contribute: its sum over ``axis`` is
due where the hidden states were gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from retro_jax.kernels import triton_call
from retro_jax.kernels.choice import Implementation, choose
from retro_jax.kernels.linear_cross_entropy import reference, xla
from retro_jax.kernels.precision import accumulation_dtype

Name = Literal["reference", "xla", "triton"]
NAME = "linear_cross_entropy"


def _refuses(hidden_ND: jax.Array) -> str | None:
    return "its sums are float32" if hidden_ND.dtype == jnp.float64 else triton_call.unavailable()


# Each gives a module with the functions ``losses`` and ``gradients``; Triton is imported when it is wanted, not before.
IMPLEMENTATIONS = {
    "reference": Implementation(lambda: reference),
    "xla": Implementation(lambda: xla),
    "triton": Implementation(lambda: import_module("retro_jax.kernels.linear_cross_entropy.triton"), _refuses),
}


class _How(NamedTuple):
    """What is known when a program is traced."""

    chunk: int
    z_loss: float
    axis: str | None
    module: Callable[[], Any]


def weighted_loss(
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
    axis: str | None = None,
    implementation: Name | None = None,
) -> jax.Array:
    """The sum of weights times (cross-entropy + z_loss lse^2), in nats, as a float32 scalar; no gradient flows to the weights.

    Args:
        hidden_ND: bfloat16, float16 or float32; products are of this dtype and accumulate in float32.
        table_VD: of that dtype, or float32, which is cast for the products; its gradient is summed in float32 and has its dtype.
        targets_N: integers in [0, V) of the whole vocabulary; negative: masked.
        weights_N: float32; 0: masked.
        chunk: at most so many tokens' logits exist at a time.
        z_loss: weight of lse^2, which keeps the logits' normaliser near 1 (Chowdhery et al. 2022, PaLM, section 5: 1e-4).
        axis: the mesh axis that divides the vocabulary; None: the table is whole.
        implementation: a name runs or raises; None takes "xla".

    Raises:
        ValueError: dtypes or shapes that do not fit, no token, ``chunk`` or ``z_loss`` out of range, an axis or an
            implementation that there is not.
    """
    return loss_and_cross_entropy(
        hidden_ND, table_VD, targets_N, weights_N, chunk=chunk, z_loss=z_loss, axis=axis, implementation=implementation
    )[0]


def loss_and_cross_entropy(
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
    axis: str | None = None,
    implementation: Name | None = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`weighted_loss`, and beside it, to be reported, the sum without the z-loss; no gradient flows through that one."""
    how = _How(chunk, z_loss, axis, choose(NAME, IMPLEMENTATIONS, implementation, hidden_ND))
    _check(how, hidden_ND, table_VD, targets_N, weights_N)
    weights_N = _live(targets_N, lax.stop_gradient(weights_N))
    loss, cross_entropy = _weighted(how, hidden_ND, table_VD, targets_N, weights_N)
    return loss, lax.stop_gradient(cross_entropy)


def token_losses(
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    targets_N: jax.Array,
    *,
    chunk: int,
    axis: str | None = None,
    implementation: Name | None = None,
) -> jax.Array:
    """Each token's cross-entropy, float32 [N] in nats, 0 where it is masked. Arguments and errors as :func:`weighted_loss`."""
    how = _How(chunk, 0.0, axis, choose(NAME, IMPLEMENTATIONS, implementation, hidden_ND))
    _check(how, hidden_ND, table_VD, targets_N)
    return _losses(how, hidden_ND, table_VD, targets_N)


def gradients(
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
    axis: str | None = None,
    implementation: Name | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """What :func:`loss_and_cross_entropy` gives, and the gradient of the loss: dhidden in the hidden states' dtype, dtable in
    float32. For who has something to do with the gradient before it is kept. Arguments and errors as :func:`weighted_loss`."""
    how = _How(chunk, z_loss, axis, choose(NAME, IMPLEMENTATIONS, implementation, hidden_ND))
    _check(how, hidden_ND, table_VD, targets_N, weights_N)
    return _gradients(how, hidden_ND, table_VD, targets_N, _live(targets_N, weights_N))


def scaled(kept: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients that a forward pass kept, times the loss's cotangent, each in its dtype."""
    dhidden_ND, dtable_VD = ((gradient.astype(cotangent.dtype) * cotangent).astype(gradient.dtype) for gradient in kept)
    return dhidden_ND, dtable_VD


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(
    how: _How, hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    losses_N, lse_N = how.module().losses(hidden_ND, table_VD, _local(how, targets_N, table_VD), chunk=how.chunk, axis=how.axis)
    return _sums(how, _marked(how, losses_N, targets_N, table_VD), lse_N, weights_N)


def _weighted_forward(
    how: _How, hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    sums, (dhidden_ND, dtable_VD) = _gradients(how, hidden_ND, table_VD, targets_N, weights_N)
    return sums, (dhidden_ND, dtable_VD.astype(table_VD.dtype))


def _weighted_backward(how: _How, kept: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]) -> tuple:
    return *scaled(kept, cotangents[0]), None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(how: _How, hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array) -> jax.Array:
    losses_N, _ = how.module().losses(hidden_ND, table_VD, _local(how, targets_N, table_VD), chunk=how.chunk, axis=how.axis)
    return _marked(how, losses_N, targets_N, table_VD)


def _losses_forward(how: _How, hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array) -> tuple[jax.Array, tuple]:
    return _losses(how, hidden_ND, table_VD, targets_N), (hidden_ND, table_VD, targets_N)


def _losses_backward(how: _How, kept: tuple[jax.Array, ...], cotangent_N: jax.Array) -> tuple:
    hidden_ND, table_VD, targets_N = kept
    _, (dhidden_ND, dtable_VD) = _gradients(how, hidden_ND, table_VD, targets_N, _live(targets_N, cotangent_N))
    return dhidden_ND, dtable_VD.astype(table_VD.dtype), None


_losses.defvjp(_losses_forward, _losses_backward)


def _gradients(
    how: _How, hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    losses_N, lse_N, dhidden_ND, dtable_VD = how.module().gradients(
        hidden_ND, table_VD, _local(how, targets_N, table_VD), weights_N, chunk=how.chunk, z_loss=how.z_loss, axis=how.axis
    )
    return _sums(how, _marked(how, losses_N, targets_N, table_VD), lse_N, weights_N), (dhidden_ND, dtable_VD)


def _local(how: _How, targets_N: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Targets counted from this device's first row of the table."""
    targets_N = targets_N.astype(jnp.int32)
    return targets_N if how.axis is None else targets_N - lax.axis_index(how.axis) * table_VD.shape[0]


def _live(targets_N: jax.Array, weights_N: jax.Array) -> jax.Array:
    return jnp.where(targets_N >= 0, weights_N, jnp.zeros_like(weights_N))


def _marked(how: _How, losses_N: jax.Array, targets_N: jax.Array, table_VD: jax.Array) -> jax.Array:
    """0 where a target is masked, NaN where it is past the vocabulary."""
    vocabulary = table_VD.shape[0] * (1 if how.axis is None else lax.axis_size(how.axis))
    losses_N = jnp.where(targets_N >= 0, losses_N, jnp.zeros_like(losses_N))
    return jnp.where(targets_N < vocabulary, losses_N, jnp.full_like(losses_N, jnp.nan))


def _sums(how: _How, losses_N: jax.Array, lse_N: jax.Array, weights_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """With the z-loss and without; a loss that is not a number does not matter where its weight is 0."""

    def total(each_N: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(weights_N != 0.0, each_N * weights_N, jnp.zeros_like(each_N)))

    cross_entropy = total(losses_N)
    return (cross_entropy + how.z_loss * total(lse_N**2) if how.z_loss else cross_entropy), cross_entropy


def _check(how: _How, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array | None = None) -> None:
    if hidden.ndim != 2 or table.ndim != 2 or targets.shape != hidden.shape[:1] or hidden.shape[1] != table.shape[1]:
        shapes = f"hidden {hidden.shape}, table {table.shape}, targets {targets.shape}"
        raise ValueError(f"{NAME}: {shapes} do not fit [N,D], [V,D], [N]")
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"{NAME}: weights {weights.shape} are not [N] = {targets.shape}")
    if 0 in (*hidden.shape, *table.shape):
        raise ValueError(f"{NAME}: hidden {hidden.shape}, table {table.shape} are empty; give at least one token, width and row")
    wide = accumulation_dtype(hidden.dtype)
    if not jnp.issubdtype(hidden.dtype, jnp.floating) or table.dtype not in (hidden.dtype, wide):
        raise ValueError(
            f"{NAME}: hidden {hidden.dtype}, table {table.dtype} do not fit; the table is of the hidden states' floating "
            f"dtype or {jnp.dtype(wide)}"
        )
    if not jnp.issubdtype(targets.dtype, jnp.signedinteger):
        raise ValueError(f"{NAME}: targets are {targets.dtype}, not int32")
    if weights is not None and weights.dtype != wide:
        raise ValueError(f"{NAME}: weights are {weights.dtype}, not {jnp.dtype(wide)}")
    if how.chunk < 1:
        raise ValueError(f"{NAME}: chunk={how.chunk} is not a number of tokens; it must be at least 1")
    if not (math.isfinite(how.z_loss) and how.z_loss >= 0.0):
        raise ValueError(f"{NAME}: z_loss={how.z_loss} must be finite and not negative")
    if how.axis is not None:
        axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        if how.axis not in axes:
            raise ValueError(f"{NAME}: axis={how.axis!r} is not one of the axes {axes} of a surrounding jax.shard_map")
