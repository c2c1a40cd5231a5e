"""Which implementation of an operation runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax


def choose(operation: str, implementations: Mapping[str, Callable[..., jax.Array]], name: str | None) -> Callable[..., jax.Array]:
    """The implementation of that name; None: "xla".

    Raises:
        ValueError: there is none of that name.
    """
    name = name or "xla"
    if name not in implementations:
        raise ValueError(f"{operation}: implementation={name!r} is not known; choose one of {', '.join(implementations)}")
    return implementations[name]
