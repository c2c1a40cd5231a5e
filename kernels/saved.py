"""What an operation keeps for its backward pass.

Left to itself JAX keeps every intermediate that a gradient is written with, in the dtype of the computation: of a norm of
bfloat16 numbers several float32 arrays of its size. The operations here keep what they were given; the backward pass computes
the intermediates again, under every recomputation policy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def from_arguments(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``function`` of arrays (or None), of which the backward pass keeps the arguments alone. Values and gradients are its own;
    it can be differentiated once, in reverse."""

    def backward(arguments: tuple[Any, ...], d_result: jax.Array) -> tuple[Any, ...]:
        # Where no loop stands between, XLA would find that it has computed all of this before, and keep it.
        return jax.vjp(function, *jax.lax.optimization_barrier(arguments))[1](d_result)

    run = jax.custom_vjp(function)
    run.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return run


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def where_kept(x: jax.Array, keep: jax.Array, rate: float = 0.0) -> jax.Array:
    """x / (1 - rate) where ``keep``, bool of x's rank, says so, and zero elsewhere; only ``keep`` is kept, 1 byte a number."""
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def _where_kept_fwd(x: jax.Array, keep: jax.Array, rate: float) -> tuple[jax.Array, jax.Array]:
    return where_kept(x, keep, rate), keep


def _where_kept_bwd(rate: float, keep: jax.Array, d_result: jax.Array) -> tuple[jax.Array, None]:
    return where_kept(d_result, keep, rate), None


where_kept.defvjp(_where_kept_fwd, _where_kept_bwd)
