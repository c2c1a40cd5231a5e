"""Processes of this machine as workers, each on a pipe of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from retro_jax.executor.crew import Event, Store, WorkerLost, outcome, outcome_event

# Seconds that a process whose pipe is closed may take to end.
ENDING = 10.0


class _Process(NamedTuple):
    process: SpawnProcess
    pipe: Connection


class Processes:
    """Spawned processes; each sends None when it is ready, and then for every block what :func:`outcome` returns."""

    def __init__(self, size: int, store: Store) -> None:
        self.size = size
        self._store = store
        self._workers: dict[int, _Process] = {}
        self._silent: set[int] = set()
        self._hired = 0

    def hire(self) -> int:
        """See :class:`~retro_jax.executor.crew.Crew`."""
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(theirs, self._store, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        worker, self._hired = self._hired, self._hired + 1
        self._workers[worker] = _Process(process, ours)
        self._silent.add(worker)
        return worker

    def give(self, worker: int, number: int, task: tuple) -> None:
        """See :class:`~retro_jax.executor.crew.Crew`."""
        with contextlib.suppress(ConnectionError):  # it is gone; events() will say so
            self._workers[worker].pipe.send((number, task))

    def events(self) -> list[Event]:
        """See :class:`~retro_jax.executor.crew.Crew`."""
        told = set(wait([source for w in self._workers.values() for source in (w.pipe, w.process.sentinel)]))
        return [
            self._told(worker, process)
            for worker, process in list(self._workers.items())
            if process.pipe in told or process.process.sentinel in told
        ]

    def dismiss(self) -> None:
        """See :class:`~retro_jax.executor.crew.Crew`."""
        for worker in self._workers.values():
            worker.process.kill()
        for worker in self._workers.values():
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def _told(self, worker: int, process: _Process) -> Event:
        try:
            error = process.pipe.recv() if process.pipe.poll() else self._lost(worker, process)
        except (EOFError, OSError):
            error = self._lost(worker, process)
        if isinstance(error, WorkerLost):
            return Event(worker, "lost", error)
        if worker in self._silent:
            self._silent.remove(worker)
            return Event(worker, "ready")
        return outcome_event(worker, error)

    def _lost(self, worker: int, process: _Process) -> WorkerLost:
        del self._workers[worker]
        process.process.join(ENDING)
        process.process.kill()
        code = process.process.exitcode
        process.pipe.close()
        how = (
            f"signal {-code}, {signal.strsignal(-code)}; out of memory?" if code is not None and code < 0 else f"exit code {code}"
        )
        return WorkerLost(f"its worker process died ({how})")


def _work(pipe: Connection, store: Store, parent: int) -> None:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at the terminal it is the parent's; it ends its workers
    try:
        pipe.send(None)
        while True:
            pipe.send(outcome(store, *pipe.recv()))
    except (EOFError, ConnectionError):
        return  # the parent is gone


def die_with(parent: int) -> None:
    """End this worker when its parent is gone: a killed run must leave no process behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
