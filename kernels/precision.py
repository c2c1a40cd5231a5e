"""Dtypes of operands, and the dtype in which sums are taken."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def accumulation_dtype(dtype: Any) -> Any:
    """float32 for float32 and every narrower dtype, float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def check_operands(operation: str, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Queries, keys and values are of one floating dtype, and none is empty.

    Raises:
        ValueError: they are not.
    """
    dtypes = {str(array.dtype) for array in (q, k, v)}
    if len(dtypes) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"{operation}: q, k and v are {', '.join(sorted(dtypes))}; give one floating dtype")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"{operation}: q {q.shape} and k {k.shape} must not be empty")
