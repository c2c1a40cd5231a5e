"""The checks that the config classes make of themselves; each raises a ValueError with names, values and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence


def check(condition: bool, message: str) -> None:
    """Raise the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_positive(config: object, *names: str) -> None:
    """Each of these fields is above 0."""
    for name in names:
        value = getattr(config, name)
        check(value > 0, f"{type(config).__name__}.{name}={value} must be positive")


def check_fraction(config: object, *names: str) -> None:
    """Each of these fields is at least 0 and below 1."""
    for name in names:
        value = getattr(config, name)
        check(0.0 <= value < 1.0, f"{type(config).__name__}.{name}={value} must be at least 0 and below 1")


def check_choice(config: object, name: str, choices: Sequence[str]) -> None:
    """The field is one of the choices."""
    value = getattr(config, name)
    check(value in choices, f"{type(config).__name__}.{name}={value!r} is not known; choose one of {', '.join(choices)}")
