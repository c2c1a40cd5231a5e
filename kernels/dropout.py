"""Which numbers dropout keeps."""

from __future__ import annotations

from math import prod

import jax
import jax.numpy as jnp


def kept(key: jax.Array, rate: float, numbers: jax.Array, width: int) -> jax.Array:
    """bool [*numbers.shape, width], False for a share of ``rate``.

    What is drawn for a row depends on the key and the row's number alone: on neither the rows beside it nor the device.

    Args:
        numbers: uint32, each row's number in the whole.
    """

    def row(number: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1.0 - rate, (width,))

    return jax.vmap(row)(numbers.reshape(-1)).reshape(*numbers.shape, width)


def kept_weights(
    kernel: str, rate: float, key: jax.Array | None, numbers: jax.Array | None, queries: tuple[int, ...], keys: int
) -> jax.Array | None:
    """Which attention weights a kernel keeps, bool [*queries, keys]; None where all are.

    Args:
        numbers: of shape ``queries``; None: their places.

    Raises:
        ValueError: there is a rate and no key.
    """
    if rate == 0.0:
        return None
    if key is None:
        raise ValueError(f"{kernel}: dropout={rate} needs a dropout_key")
    return kept(key, rate, jnp.arange(prod(queries), dtype=jnp.uint32).reshape(queries) if numbers is None else numbers, keys)
