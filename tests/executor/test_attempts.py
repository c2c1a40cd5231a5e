"""The rule: what is tried again, when, what is given up, and what ends the run."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from retro_jax.errors import BadInput, UserError
from retro_jax.executor.attempts import Failure, compute_all, failures_in_words
from retro_jax.executor.crew import Event, InThisProcess, WorkerLost

# What becomes of a block at its next attempts: an exception is raised, WorkerLost takes the worker with it; then all is well.
Fates = dict[int, list[Exception]]
LOST = WorkerLost("gone")


class Scripted:
    """A crew that computes nothing; blocks end in the order in which they were given."""

    def __init__(self, size: int, fates: Fates, *, starts_lost: int = 0) -> None:
        self.size, self.fates, self.starts_lost = size, {number: deque(fate) for number, fate in fates.items()}, starts_lost
        self.hired, self.dismissed = 0, False
        self.given: list[int] = []
        # For each block given, those that were being computed beside it.
        self.beside: list[set[int]] = []
        self._waiting = deque[Event]()
        self._running: dict[int, int] = {}

    def hire(self) -> int:
        self.hired += 1
        lost, self.starts_lost = self.starts_lost > 0, self.starts_lost - 1
        self._waiting.append(Event(self.hired, "lost", LOST) if lost else Event(self.hired, "ready"))
        return self.hired

    def give(self, worker: int, number: int, task: tuple) -> None:
        assert task == (number,) and worker not in self._running
        self.given.append(number)
        self.beside.append(set(self._running.values()))
        self._running[worker] = number

    def events(self) -> list[Event]:
        if self._waiting:
            return [self._waiting.popleft()]
        worker, number = next(iter(self._running.items()))
        del self._running[worker]
        fate = self.fates.get(number)
        error = fate.popleft() if fate else None
        return [Event(worker, "done" if error is None else "lost" if error is LOST else "raised", error)]

    def dismiss(self) -> None:
        self.dismissed = True


def run(crew: Scripted, blocks: int = 6, attempts: int = 3) -> tuple[list[Failure], int]:
    """What was given up, and how many blocks were done."""
    done: list[int] = []
    numbered = ((number, (number,)) for number in range(blocks))
    try:
        failures = compute_all(
            crew,
            numbered,
            attempts=attempts,
            description="stage",
            describe=lambda task: f"the {task[0]}",
            advance=lambda: done.append(1),
        )
    finally:
        assert crew.dismissed
    return failures, len(done)


def test_all_are_computed_once() -> None:
    crew = Scripted(3, {})
    assert run(crew) == ([], 6)
    assert crew.given == list(range(6)) and crew.hired == 3


def test_no_more_workers_than_blocks() -> None:
    crew = Scripted(8, {})
    assert run(crew, blocks=2) == ([], 2)
    assert crew.hired == 2
    assert run(none := Scripted(8, {}), blocks=0) == ([], 0) and none.hired == 0


def test_what_failed_is_tried_again_when_the_others_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    crew = Scripted(2, {1: [KeyError("x")], 2: [LOST]})
    assert run(crew) == ([], 6)
    assert crew.given == [0, 1, 2, 3, 4, 5, 1, 2] and crew.hired == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "stage: block 1 (the 1): KeyError: 'x'; attempt 1 of 3, it is tried again when the others are done"
    assert lines[1] == "stage: block 2 (the 2): gone; attempt 1 of 3, it is tried again when the others are done"


@pytest.mark.parametrize("error", [LOST, KeyError("x")], ids=["lost", "raised"])
def test_a_block_is_given_up_and_all_else_is_done(error: Exception) -> None:
    """A poisonous block takes no attempt from the blocks beside it."""
    crew = Scripted(3, {1: [error] * 3, 3: [LOST, LOST]})
    failures, done = run(crew)
    assert [(f.number, f.covers, f.error) for f in failures] == [(1, "the 1", error)] and done == 5
    assert [crew.given.count(number) for number in range(6)] == [1, 3, 1, 3, 1, 1]


def test_the_last_attempt_is_made_alone() -> None:
    crew = Scripted(3, {0: [LOST] * 3, 1: [LOST] * 2, 2: [LOST] * 2, 3: [KeyError("x")]})
    failures, done = run(crew, blocks=5)
    assert [f.number for f in failures] == [0] and done == 4
    for at, number in enumerate(crew.given):
        if crew.given[:at].count(number) == 2:
            assert crew.beside[at] == set() and (at + 1 == len(crew.given) or crew.beside[at + 1] == set())
    assert any(crew.beside)


def test_one_attempt_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    failures, done = run(Scripted(2, {1: [KeyError("x")]}), attempts=1)
    assert [f.number for f in failures] == [1] and done == 5
    assert capsys.readouterr().err == "stage: block 1 (the 1): KeyError: 'x'; attempt 1 of 1, it is given up\n"


@pytest.mark.parametrize(
    "error", [BadInput("bad"), UserError("wrong"), *(OSError(n, "no") for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))]
)
def test_what_no_attempt_mends_ends_the_run(error: Exception) -> None:
    crew = Scripted(2, {1: [error]})
    with pytest.raises(type(error)) as raised:
        run(crew, blocks=20)
    assert raised.value is error and len(crew.given) < 5


def test_other_errors_of_the_system_are_tried_again() -> None:
    assert run(Scripted(2, {1: [OSError(errno.EIO, "Input/output error")]})) == ([], 6)


def test_workers_that_never_begin_end_the_run() -> None:
    assert run(Scripted(2, {}, starts_lost=2)) == ([], 6)
    crew = Scripted(2, {}, starts_lost=100)
    with pytest.raises(UserError, match=r"3 workers one after another have ended before their first block \(gone\)"):
        run(crew)
    assert crew.hired < 6 and not crew.given


def test_tasks_are_read_as_they_are_needed() -> None:
    """Beyond those that run, no more than there are workers."""
    read: list[int] = []
    crew = Scripted(2, {})

    def numbered() -> Iterator[tuple[int, tuple]]:
        for number in range(50):
            assert number <= len(crew.given) + crew.size
            read.append(number)
            yield number, (number,)

    advance: Callable[[], None] = lambda: None  # noqa: E731
    assert compute_all(crew, numbered(), attempts=3, description="", describe=str, advance=advance) == []
    assert len(read) == 50


def test_in_this_process() -> None:
    stored: list[int] = []

    def store(number: int, task: tuple) -> None:
        stored.append(number)
        if number == 1 or (number == 2 and stored.count(2) == 1):
            raise KeyError(number)

    numbered = [(number, ()) for number in range(4)]
    failures = compute_all(InThisProcess(store), numbered, attempts=3, description="", describe=str, advance=lambda: None)
    assert [f.number for f in failures] == [1] and stored == [0, 1, 2, 3, 1, 2, 1]


def test_the_last_sentence_names_blocks() -> None:
    failures = [Failure(n, f"the {n}", KeyError("x\ny")) for n in range(12)]
    text = failures_in_words(failures, 3, "stage")
    assert text.startswith("stage: 12 blocks failed 3 times, all others are finished and kept;") and "\n" not in text
    assert "block 9 (the 9): KeyError" in text and "block 10" not in text and text.endswith("and 2 more, named above")
    assert failures_in_words(failures[:1], 3, "stage").startswith("stage: 1 block failed 3 times")
