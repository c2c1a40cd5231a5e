"""A trained model's checkpoint, read layer by layer: of a stack of layers one row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from retro_jax.interop.files import Fact
from retro_jax.interop.slots import Slot, form_of, slots
from retro_jax.training.checkpoint import Checkpoints, numbers_have_changed, opened_checkpoint
from retro_jax.training.state import Path as StatePath
from retro_jax.training.state import digests, row_digest


class RunSource:
    """The parameters of a checkpoint under our names, and their config.

    The checkpoint holds a digest of every array. Each row that is read is counted, and when the last one of an array is, the sum
    must be that digest.

    Args:
        folder: a model's folder, ``<workdir>/models/<name>``.
        which: "latest", "best", or a step.

    Raises:
        UserError: there is no such checkpoint, or it is corrupted; the latter from the methods, too.
    """

    def __init__(self, folder: Path, which: str | int) -> None:
        with opened_checkpoint(folder, which) as (checkpoints, self._step, self.config):
            self._facts, self._slots = form_of(self.config).facts, slots(self.config)
            self._arrays = checkpoints.stored_params(self._step, {_name(path): fact.shape for path, fact in self._facts.items()})
            self._folder, self._digests = checkpoints.folder, checkpoints.about(self._step).digests
        self._counted: dict[StatePath, dict[int, int]] = {path: {} for path in self._facts}
        with self._corruption_told():
            self.facts = {name: Fact(slot.shape, self._arrays.dtype(_name(slot.path))) for name, slot in self._slots.items()}

    def read(self, name: str) -> np.ndarray:
        slot = self._slots[name]
        with self._corruption_told():
            values = self._arrays.read(_name(slot.path), slot.row)
            self._count(slot, values)
        return values

    def read_the_rest(self) -> None:
        """Read what was not asked for, so that all of the checkpoint is checked."""
        for name, slot in self._slots.items():
            if (slot.row or 0) not in self._counted[slot.path]:
                self.read(name)

    def _count(self, slot: Slot, values: np.ndarray) -> None:
        """Add a row to what is known of its array; read again, it counts anew."""
        counted = self._counted[slot.path]
        if slot.row is None:
            counted[0], rows = int(digests([values])[0]), 1
        else:
            counted[slot.row], rows = int(row_digest(values, np.uint32(slot.row))), self._facts[slot.path].shape[0]
        name = _name(slot.path)
        if len(counted) == rows and sum(counted.values()) % 2**32 != self._digests[name]:
            raise numbers_have_changed(name)

    @contextmanager
    def _corruption_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            with Checkpoints(self._folder, keep=1) as checkpoints:
                raise checkpoints.corrupted(self._step, error) from error


def _name(path: StatePath) -> str:
    return ".".join(map(str, path))
