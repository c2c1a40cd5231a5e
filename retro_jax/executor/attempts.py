"""The rule by which blocks are computed, tried again, and given up, whoever computes them."""

from __future__ import annotations

import errno
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from retro_jax.errors import UserError
from retro_jax.executor.crew import Crew, Event, WorkerLost

# What no second attempt mends: the command says what does.
END_THE_RUN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
# So many workers that end one after another before they are ready for a block: none will be.
STARTS_LOST = 3
REASON_LETTERS = 300
SHOWN = 10


@dataclass(frozen=True)
class Failure:
    """A block that was given up: its number, what it covers, and what ended the last attempt."""

    number: int
    covers: str
    error: Exception

    def __str__(self) -> str:
        return f"block {self.number} ({self.covers}): {_reason(self.error)}"


def compute_all(
    crew: Crew,
    numbered: Iterable[tuple[int, tuple]],
    *,
    attempts: int,
    description: str,
    describe: Callable[[tuple], str],
    advance: Callable[[], None],
) -> list[Failure]:
    """Compute the block of every task, and return those that failed ``attempts`` times.

    A block fails when it raises, or when its worker is lost; that is told on standard error. It is tried again when all others
    have been, and its last attempt is made while nothing else runs, so that two blocks which are too large for the machine side
    by side do not take each other's attempts.

    Args:
        crew: who computes; its workers are gone when this returns or raises.
        numbered: numbers and tasks, read as they are needed.
        attempts: how often a block may fail.
        description: names the stage in messages.
        describe: what a task covers, in words.
        advance: called for every block that is done.

    Raises:
        UserError: a block raised one; workers cannot be started.
        OSError: a block cannot be written, as the disk is full or may not be written to.
    """
    run = _Run(crew, numbered, attempts, description, describe)
    try:
        while run.goes_on():
            for event in crew.events():
                if run.take(event):
                    advance()
    finally:
        crew.dismiss()
    return sorted(run.given_up, key=lambda failure: failure.number)


def failures_in_words(failures: list[Failure], attempts: int, description: str) -> str:
    """The sentence with which the run ends."""
    count = f"{len(failures)} block{'s' if len(failures) > 1 else ''}"
    named = "; ".join(map(str, failures[:SHOWN]))
    more = f"; and {len(failures) - SHOWN} more, named above" if len(failures) > SHOWN else ""
    return (
        f"{description}: {count} failed {attempts} times, all others are finished and kept; mend the cause and run again, which "
        f"computes only what is missing: {named}{more}"
    )


class _Run:
    def __init__(
        self, crew: Crew, numbered: Iterable[tuple[int, tuple]], attempts: int, description: str, describe: Callable[[tuple], str]
    ) -> None:
        self.given_up: list[Failure] = []
        self._crew, self._description, self._describe = crew, description, describe
        self._fresh, self._next = iter(numbered), deque[tuple[int, tuple]]()
        self._again, self._attempts = deque[tuple[int, tuple]](), attempts
        self._failed: dict[int, int] = {}
        self._starting, self._idle = set[int](), list[int]()
        self._running: dict[int, tuple[int, tuple]] = {}
        self._starts_lost = 0

    def goes_on(self) -> bool:
        """Give blocks to the workers that are free, and start workers that are lacking; False when nothing is left to do."""
        while self._idle and (block := self._take()):
            worker = self._idle.pop()
            self._running[worker] = block
            self._crew.give(worker, *block)
        waiting = self._waiting()
        while len(self._starting) + len(self._idle) + len(self._running) < min(self._crew.size, waiting + len(self._running)):
            self._starting.add(self._crew.hire())
        return bool(self._running) or waiting > 0

    def take(self, event: Event) -> bool:
        """Note what a worker has told; True where a block is done."""
        if event.kind == "ready":
            self._starting.remove(event.worker)
            self._idle.append(event.worker)
            self._starts_lost = 0
            return False
        if event.worker not in self._running:
            self._lost_without_block(event)
            return False
        number, task = self._running.pop(event.worker)
        if event.kind != "lost":
            self._idle.append(event.worker)
        if event.error is not None:
            self._note_failure(number, task, event.error)
        return event.error is None

    def _waiting(self) -> int:
        """How many blocks are known to wait, up to the crew's size: no more tasks than that are held in memory."""
        while len(self._next) < self._crew.size and (block := next(self._fresh, None)):
            self._next.append(block)
        return len(self._next) + len(self._again)

    def _take(self) -> tuple[int, tuple] | None:
        if self._waiting() == 0:
            return None
        if self._next:
            return self._next.popleft()
        alone = self._has_one_attempt(self._again[0]) or any(map(self._has_one_attempt, self._running.values()))
        return None if self._running and alone else self._again.popleft()

    def _has_one_attempt(self, block: tuple[int, tuple]) -> bool:
        """After a failure; a block's only attempt is one like others."""
        return self._failed.get(block[0], 0) == self._attempts - 1 > 0

    def _note_failure(self, number: int, task: tuple, error: Exception) -> None:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in END_THE_RUN):
            raise error
        failure = Failure(number, self._describe(task), error)
        self._failed[number] = self._failed.get(number, 0) + 1
        last = self._failed[number] == self._attempts
        if last:
            self.given_up.append(failure)
        else:
            self._again.append((number, task))
        ending = "it is given up" if last else "it is tried again when the others are done"
        print(f"{self._description}: {failure}; attempt {self._failed[number]} of {self._attempts}, {ending}", file=sys.stderr)

    def _lost_without_block(self, event: Event) -> None:
        if event.worker in self._idle:
            self._idle.remove(event.worker)
            return
        self._starting.remove(event.worker)
        self._starts_lost += 1
        if self._starts_lost == STARTS_LOST:
            raise UserError(
                f"{self._description}: {STARTS_LOST} workers one after another have ended before their first block "
                f"({_reason(event.error)}); a program that builds with several workers starts under if __name__ == '__main__'"
            ) from event.error


def _reason(error: Exception | None) -> str:
    text = " ".join(str(error).split())[:REASON_LETTERS]
    return text if isinstance(error, WorkerLost) else f"{type(error).__name__}: {text}"
