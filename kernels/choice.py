"""Which implementation of an operation runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

# Compute capability of the GPUs that programs are lowered for in a process that has none.
_lowered_for: ContextVar[int | None] = ContextVar("lowered_for", default=None)


class Implementation(NamedTuple):
    """What runs it, and ``refuses``, which takes the operation's arguments and says why it cannot run them, or None."""

    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *_, **__: None


@contextmanager
def lowering_for_gpu(capability: int) -> Iterator[None]:
    """Programs traced inside are for GPUs of this compute capability (90: H100), which this process need not have."""
    token = _lowered_for.set(capability)
    try:
        yield
    finally:
        _lowered_for.reset(token)


def runs_on_gpu() -> bool:
    """Whether what is traced now will run on a GPU."""
    return _lowered_for.get() is not None or jax.default_backend() == "gpu"


def gpu_capability() -> int:
    """The compute capability of the GPU that what is traced now will run on: 80 for A100, 90 for H100."""
    named = _lowered_for.get()
    return named or int(jax.devices()[0].compute_capability.replace(".", ""))


def choose(
    operation: str, implementations: Mapping[str, Implementation], name: str | None, *arguments: Any, **keywords: Any
) -> Callable[..., Any]:
    """The implementation of that name; None: "xla", everywhere.

    Raises:
        ValueError: there is none of that name, or it refuses the arguments.
    """
    name = name or "xla"
    if name not in implementations:
        raise ValueError(f"{operation}: implementation={name!r} is not known; choose one of {', '.join(implementations)}")
    reason = implementations[name].refuses(*arguments, **keywords)
    if reason is not None:
        raise ValueError(f"{operation}: implementation={name!r} cannot run this: {reason}")
    return implementations[name].run
