"""Several processes that train together: one a host, or one a device.

They are started by whatever starts the job. Each reads its own rows of every batch; the first one alone writes logs and tells
what happens; checkpoints are written by all. A process that is gone ends the others within :data:`HEARTBEAT_SECONDS`.
"""

from __future__ import annotations

import argparse
import os
import sys

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.errors import UserError
from retro_jax.parallel.axes import AXES
from retro_jax.parallel.layout import Layout

HEARTBEAT_SECONDS = 60


def join_processes(arguments: argparse.Namespace) -> None:
    """Find the other processes, if the command line says that there are any; all but the first fall silent.

    Args:
        arguments: of :func:`retro_jax.cli.add_processes`.

    Raises:
        UserError: the launcher is not known, or the arguments do not say everything, or what cannot be.
    """
    given = {
        "coordinator_address": arguments.coordinator,
        "num_processes": arguments.processes,
        "process_id": arguments.process,
    }
    missing = [name for name, value in given.items() if value is None]
    if not arguments.distributed and len(missing) == len(given):
        return
    if 0 < len(missing) < len(given):
        raise UserError("--coordinator, --processes and --process are given together, or none of them where the launcher says it")
    if not missing:
        _refuse_impossible(**given)
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        raise UserError(
            f"no launcher was recognised ({str(error).rstrip('.')}); start the processes with SLURM, Open MPI or Kubernetes, or "
            "give each of them --coordinator HOST:PORT --processes N --process I"
        ) from None
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open for the rest of the process


def _refuse_impossible(coordinator_address: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator {coordinator_address} is not HOST:PORT; name the first process's host and a free port")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process {process_id} is none of --processes {num_processes}; number the processes from 0, and count all of them"
        )


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Whether this process has others beside it."""
    return jax.process_count() > 1


class Agreement:
    """Answers a question of each process with the same yes or no on all of them: yes if any says yes.

    The answer is asked for at one step and read at the next, so that no device waits for it.
    """

    def __init__(self, layout: Layout | None) -> None:
        self._layout = layout if are_several() else None
        if self._layout is not None:
            axes = P(AXES)
            self._place = NamedSharding(self._layout.mesh, axes)
            self._any = jax.jit(self._layout.run(lambda said: lax.pmax(said[0], AXES), axes, P()))

    def ask(self, yes: bool) -> jax.Array | bool:
        """Say yes or no, and begin to hear the others."""
        if self._layout is None:
            return yes
        said = np.full(len(self._layout.mesh.local_devices), yes, np.int32)
        return self._any(jax.make_array_from_process_local_data(self._place, said))
