"""What a traced function keeps and exchanges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from retro_jax.planning.program import Collective, saved_inside


def saved_by(function: Callable[..., jax.Array], *arguments: Any) -> int:
    """Bytes that a function of arrays, or of their shapes, keeps for its backward pass beside its arguments."""
    residuals = jax.make_jaxpr(lambda *arguments: jax.tree.leaves(jax.vjp(function, *arguments)[1]))(*arguments)
    return saved_inside(residuals).device


def exchanged(exchanges: list[Collective], scan: str | None) -> Counter[str]:
    """How many exchanges of each kind stand in the scans of a direction, or outside of all (None)."""
    return Counter(e.operation for e in exchanges if e.scan == scan)
