"""The arrays of a checkpoint, read a row at a time: Orbax itself restores whole arrays only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorstore
from orbax.checkpoint import serialization, type_handlers


class StoredArrays:
    """The arrays of one Orbax item, by name, opened as Orbax opens them. A row takes the memory of the piece that holds it.

    Args:
        folder: of the item, ``<checkpoints>/<step>/params``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ocdbt = type_handlers.is_ocdbt_checkpoint(self._folder)
        self._context = serialization.get_ts_context(use_ocdbt=self._ocdbt)
        self._opened: dict[str, tensorstore.TensorStore] = {}

    def dtype(self, name: str) -> np.dtype:
        """The dtype of an array."""
        return self._open(name).dtype.numpy_dtype

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """A whole array, or one row of its leading dim.

        Raises:
            ValueError: it is not there, or a checksum of the format differs.
        """
        array = self._open(name)
        return (array if row is None else array[row]).read().result()

    def _open(self, name: str) -> tensorstore.TensorStore:
        if name not in self._opened:
            info = type_handlers.ParamInfo(
                name=name, parent_dir=self._folder, is_ocdbt_checkpoint=self._ocdbt, ts_context=self._context
            )
            spec = tensorstore.Spec(type_handlers.get_json_tspec_read(info, use_ocdbt=self._ocdbt))
            self._opened[name] = tensorstore.open(spec, open=True, read=True, context=self._context).result()
        return self._opened[name]
