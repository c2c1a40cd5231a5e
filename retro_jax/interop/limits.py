"""What another implementation fixes: settings of ours, and the values that it can compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from retro_jax.config import ModelConfig


class Limit(NamedTuple):
    """A setting's name, how it is read from a config, and the values that can be computed, which may depend on the config."""

    name: str
    value_of: Callable[[Any], object]
    allowed: tuple[object, ...] | Callable[[Any], tuple[object, ...]]


class Hindrance(NamedTuple):
    """A setting that cannot be computed: its name and value, and the values that can."""

    name: str
    value: object
    allowed: tuple[object, ...]


def hindrances(config: ModelConfig, limits: Iterable[Limit]) -> list[Hindrance]:
    """The settings that stand in the way; those of the retrieval path only where the model has one."""
    found = []
    for name, value_of, allowed in limits:
        if config.retro is None and not name.startswith("ModelConfig"):
            continue
        value, values = value_of(config), allowed(config) if callable(allowed) else allowed
        if value not in values:
            found.append(Hindrance(name, value, values))
    return found
