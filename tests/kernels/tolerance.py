"""The rule for a kernel's error: a multiple of what a plain computation in the same dtype makes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.tolerance import largest_errors


def assert_as_good_as(ours: Any, plain: Any, exact: Any, *, factor: float, name: str, least: float = 0.0) -> None:
    """The largest error of ``ours`` against ``exact`` is at most ``factor`` times that of ``plain``, or of ``least``."""
    error, allowed = largest_errors(ours, plain, exact)
    assert allowed > 0.0, f"{name}: the plain computation is exact; the rule cannot fail"
    allowed = max(allowed, least)
    assert error <= factor * allowed, f"{name}: error {error:.2e}, the plain computation's {allowed:.2e}, factor {factor}"


def widened(arrays: Iterable[Any]) -> tuple[Any, ...]:
    """The same numbers in float64, as JAX arrays; None stays None."""
    return tuple(None if a is None else jnp.asarray(np.asarray(a, np.float64)) for a in arrays)
