"""The dtype in which sums are taken."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def accumulation_dtype(dtype: Any) -> Any:
    """float32 for float32 and every narrower dtype, float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
