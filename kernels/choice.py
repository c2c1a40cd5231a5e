"""Which implementation of an operation runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import jax

log = logging.getLogger(__name__)
# Compute capability of the GPUs that programs are lowered for in a process that has none.
_lowered_for: ContextVar[int | None] = ContextVar("lowered_for", default=None)


class Implementation(NamedTuple):
    """A function, and ``refuses``, which takes the same arguments and says why it cannot run them, or None."""

    run: Callable[..., jax.Array]
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
    operation: str,
    implementations: Mapping[str, Implementation],
    name: str | None,
    *arguments: Any,
    on_gpu: Sequence[str] = ("xla",),
    **keywords: Any,
) -> Callable[..., jax.Array]:
    """The implementation of that name; None: "xla", and on a GPU the first ``on_gpu`` that takes these arguments.

    Raises:
        ValueError: there is none of that name, or it refuses the arguments.
    """
    if name is not None:
        if name not in implementations:
            raise ValueError(f"{operation}: implementation={name!r} is not known; choose one of {', '.join(implementations)}")
        reason = implementations[name].refuses(*arguments, **keywords)
        if reason is not None:
            raise ValueError(f"{operation}: implementation={name!r} cannot run this: {reason}")
        return implementations[name].run
    refused: list[str] = []
    for candidate in on_gpu if runs_on_gpu() else ("xla",):
        reason = implementations[candidate].refuses(*arguments, **keywords)
        if reason is None:
            if refused:
                _tell(operation, candidate, tuple(refused))
            return implementations[candidate].run
        refused.append(f"{candidate}: {reason}")
    raise ValueError(f"{operation}: no implementation can run this: {'; '.join(refused)}")


@cache  # once each
def _tell(operation: str, taken: str, refused: tuple[str, ...]) -> None:
    log.warning("%s runs as %s (%s)", operation, taken, "; ".join(refused))
