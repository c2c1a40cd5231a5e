"""Actors of a Ray cluster as workers. Ray is imported when the first is wanted."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import retro_jax
from retro_jax.config import ExecutorConfig
from retro_jax.errors import UserError
from retro_jax.executor.crew import Event, Store, WorkerLost, outcome, outcome_event

# Seconds: until an address answers, between two lines about a cluster that has no room, and for killed actors to be gone.
ANSWER, PATIENCE, ENDING = 10.0, 30.0, 30.0


class RayActors:
    """Actors of one CPU and ``gpus`` GPUs, spread over the cluster; they write their blocks into the shared folder themselves."""

    def __init__(self, size: int, store: Store, config: ExecutorConfig, folder: Path, gpus: float) -> None:
        self.size = size
        self._store, self._config, self._folder, self._gpus = store, config, folder, gpus
        self._actors: dict[int, Any] = {}
        # What each actor was asked, as Ray's reference to the answer.
        self._asked: dict[Any, int] = {}
        self._starting: set[int] = set()
        self._hired = 0

    def hire(self) -> int:
        """See :class:`~retro_jax.executor.crew.Crew`.

        Raises:
            UserError: Ray is not installed, the cluster does not answer, or has no such GPU.
        """
        ray = connected(self._config)
        self._refuse_missing_gpus(ray)
        actor = ray.remote(_Actor).options(num_cpus=1, num_gpus=self._gpus, scheduling_strategy="SPREAD").remote(self._store)
        worker, self._hired = self._hired, self._hired + 1
        self._actors[worker] = actor
        self._starting.add(worker)
        ready = actor.begin.remote(Path.cwd(), self._folder, retro_jax.__version__, self._gpus)
        self._asked[ready] = worker
        return worker

    def give(self, worker: int, number: int, task: tuple) -> None:
        """See :class:`~retro_jax.executor.crew.Crew`."""
        self._asked[self._actors[worker].compute.remote(number, task)] = worker

    def events(self) -> list[Event]:
        """See :class:`~retro_jax.executor.crew.Crew`.

        Raises:
            UserError: a machine of the cluster does not see the folder, or has another version of this package.
        """
        ray = connected(self._config)
        told, _ = ray.wait(list(self._asked), timeout=PATIENCE)
        if not told and len(self._starting) == len(self._actors):
            free = ray.available_resources()
            there = f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free"
            print(f"waiting for the Ray cluster to start a worker of 1 CPU and {self._gpus:g} GPUs; {there}", file=sys.stderr)
        return [self._told(ray, answer) for answer in told]

    def dismiss(self) -> None:
        """See :class:`~retro_jax.executor.crew.Crew`."""
        if not self._actors:
            return
        ray = connected(self._config)
        for actor in self._actors.values():
            ray.kill(actor)
        if self._asked:
            ray.wait(list(self._asked), num_returns=len(self._asked), timeout=ENDING)
        self._actors.clear()
        self._asked.clear()

    def _told(self, ray: ModuleType, answer: Any) -> Event:
        worker = self._asked.pop(answer)
        try:
            error = ray.get(answer)
        except (ray.exceptions.RayError, OSError) as lost:
            ray.kill(self._actors.pop(worker))  # one that is merely out of reach must not write any more
            self._starting.discard(worker)
            return Event(worker, "lost", WorkerLost(f"its Ray actor is gone: {lost}"))
        if worker in self._starting:
            self._starting.remove(worker)
            if error is not None:
                raise error
            return Event(worker, "ready")
        return outcome_event(worker, error)

    def _refuse_missing_gpus(self, ray: ModuleType) -> None:
        most = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        if self._gpus > most:
            raise UserError(
                f"ExecutorConfig.gpus={self._gpus:g}, but no machine of the Ray cluster has more than {most:g} GPUs; "
                "lower it, or start Ray there with --num-gpus"
            )


class _Actor:
    """What runs on the cluster."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def begin(self, directory: Path, folder: Path, version: str, gpus: float) -> UserError | None:
        """Make this process like one that was started where the command was; returns what is wrong with the machine."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # several actors share the machine
        if 0 < gpus < 1:
            os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if directory.is_dir():
            os.chdir(directory)
        host = socket.gethostname()
        if retro_jax.__version__ != version:
            return UserError(
                f"the Ray machine {host} has retro_jax {retro_jax.__version__}, this one has {version}; install the same on all"
            )
        if not folder.is_dir():
            return UserError(
                f"the Ray machine {host} does not see {folder}; put --workdir on a file system that all machines have at the "
                "same path, and give the whole path"
            )
        return None

    def compute(self, number: int, task: tuple) -> Exception | None:
        """See :func:`outcome`."""
        return outcome(self._store, number, task)


def connected(config: ExecutorConfig) -> ModuleType:
    """Ray, connected to the cluster that ``config`` names, or to the one that this process has joined before.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            "ExecutorConfig.kind='ray' needs Ray, which is not installed; install retro-jax[ray], or use 'local'"
        ) from None
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS", "auto") if config.address == "auto" else config.address
    try:
        _refuse_silent(address)
        with _own_sigterm():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"no Ray cluster answers at ExecutorConfig.address={config.address!r} ({reason}); start one with ray start --head, "
            "give its host:port, or use kind='local'"
        ) from None
    return ray


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for the rest of the process, in which training may follow; what stood there before is put back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _refuse_silent(address: str) -> None:
    """Ray itself would wait for minutes for an address where nobody listens."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
