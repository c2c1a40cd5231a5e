"""What workers compute in the tests of executors: functions that a process can import without much else."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil

from retro_jax.errors import BadInput


def numbers(number: int, marks: Path) -> dict[str, np.ndarray]:
    """The same for a number, whatever happens; every call leaves a mark."""
    with open(marks / f"called-{number}", "a") as file:
        file.write(f"{os.getpid()}\n")
    return {"a": np.arange(number * 10, number * 10 + 10), "b": np.full((2, 3), number, np.float32)}


def dies_once(number: int, marks: Path) -> dict[str, np.ndarray]:
    """The process that computes block 2 is killed in the middle of it, the first time."""
    arrays = numbers(number, marks)
    if number == 2 and calls(marks, 2) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return arrays


def poisonous(number: int, marks: Path) -> dict[str, np.ndarray]:
    """Block 2 kills its process, block 4 raises, until they are mended."""
    arrays = numbers(number, marks)
    if not (marks / "mended").exists():
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 4:
            raise KeyError("four")
    return arrays


def disk_full(number: int, marks: Path) -> dict[str, np.ndarray]:
    """Block 1 finds no space."""
    if number == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return numbers(number, marks)


def bad_input(number: int, marks: Path) -> dict[str, np.ndarray]:
    """Block 1 cannot be made from what is there."""
    if number == 1:
        raise BadInput("the input is bad; mend it")
    return numbers(number, marks)


class EndsItsProcess:
    """Cannot be opened in another process: that ends."""

    def __reduce__(self) -> tuple:
        return os._exit, (7,)

    def __call__(self, number: int, marks: Path) -> dict[str, np.ndarray]:
        raise AssertionError


@contextmanager
def workers_killed(partial: Path, name: str, processes: Callable[[], Iterable[psutil.Process]]) -> Iterator[list[int]]:
    """SIGKILL to every process that has ``name`` in its command line, as soon as a block of this stage is stored; gives the list
    that they will stand in. One of them alone may be a worker that is still starting, which has no block to lose."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not list((partial / "blocks").glob("*.done")) and time.monotonic() < deadline:
            time.sleep(0.002)
        for process in processes():
            with suppress(psutil.Error):  # it has ended by itself
                if name in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    yield killed
    killer.join()


def calls(marks: Path, number: int) -> int:
    """How often a block was begun."""
    path = marks / f"called-{number}"
    return len(path.read_text().splitlines()) if path.exists() else 0


def workers(marks: Path) -> set[int]:
    """The processes that computed."""
    return {int(line) for path in marks.glob("called-*") for line in path.read_text().splitlines()}
