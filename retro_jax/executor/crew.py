"""What the executors have in common: workers that compute one block at a time, and what they tell."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

# Computes the block of this number from its task, and stores it.
Store: TypeAlias = Callable[[int, tuple], None]


@dataclass(frozen=True)
class Event:
    """A worker is "ready" for its first block, has stored its block ("done"), could not compute it ("raised", with the
    exception), or is gone, with its block if it had one ("lost", with what is known of its end)."""

    worker: int
    kind: Literal["ready", "done", "raised", "lost"]
    error: Exception | None = None


class WorkerLost(Exception):
    """A worker has ended without a word; the text says what is known of it."""


class Crew(Protocol):
    """Up to ``size`` workers. As each has one block at a time, it is known which block a worker took with it."""

    @property
    def size(self) -> int:
        """How many workers there may be."""
        ...

    def hire(self) -> int:
        """Start a worker and return its number; it takes a block when it is ready."""
        ...

    def give(self, worker: int, number: int, task: tuple) -> None:
        """Have a worker that is free compute and store a block."""
        ...

    def events(self) -> list[Event]:
        """Wait until a worker has something to tell; at least one event, or none where that takes long."""
        ...

    def dismiss(self) -> None:
        """End all workers at once. When it returns, none of them writes any more."""
        ...


class InThisProcess:
    """A crew of one, which computes when it is asked what there is to tell."""

    size = 1

    def __init__(self, store: Store) -> None:
        self._store = store
        self._given: tuple[int, tuple] | None = None

    def hire(self) -> int:
        """See :class:`Crew`."""
        return 0

    def give(self, worker: int, number: int, task: tuple) -> None:
        """See :class:`Crew`."""
        self._given = number, task

    def events(self) -> list[Event]:
        """See :class:`Crew`."""
        if self._given is None:
            return [Event(0, "ready")]
        (number, task), self._given = self._given, None
        try:
            self._store(number, task)
        except Exception as error:
            return [Event(0, "raised", error)]
        return [Event(0, "done")]

    def dismiss(self) -> None:
        """See :class:`Crew`."""


def outcome(store: Store, number: int, task: tuple) -> Exception | None:
    """Compute and store a block in a worker; returns the exception that it raised, so that it can be sent, with its traceback."""
    try:
        store(number, task)
    except Exception as error:
        error.add_note(f"in the worker:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}")
        return error
    return None


def outcome_event(worker: int, error: Exception | None) -> Event:
    """What :func:`outcome` returned, as an event."""
    return Event(worker, "done") if error is None else Event(worker, "raised", error)
