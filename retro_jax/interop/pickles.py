"""PyTorch's files, weights only: mapped into memory, and read one tensor at a time."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from retro_jax.errors import UserError
from retro_jax.interop.files import Fact

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What has been read of a mapped file counts as memory of the process as long as the file is mapped: after so many bytes it is
# mapped anew.
MAPPED_BYTES = 2**26


class PickleSource:
    """The tensors of files written by ``torch.save``: of a training checkpoint its "model", else everything.

    Raises:
        UserError: a file holds more than tensors, or a tensor of a dtype that NumPy lacks.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.facts: dict[str, Fact] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            for name, tensor in _load(file).items():
                self.facts[name] = Fact(tuple(tensor.shape), _dtype(name, file, tensor))
                self._files[name] = file
        self._mapped: tuple[Path, dict[str, torch.Tensor]] | None = None
        self._read = 0

    def read(self, name: str) -> np.ndarray:
        file = self._files[name]
        if self._mapped is None or self._mapped[0] != file or self._read > MAPPED_BYTES:
            self._mapped, self._read = (file, _load(file)), 0
        self._read += self.facts[name].nbytes
        return _array(self._mapped[1][name])


def _load(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name, mapped."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # Megatron keeps its arguments beside the model
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read as tensors alone ({reason}); save its model as safetensors first") from error
    return dict(_named("", held["model"] if isinstance(held.get("model"), dict) else held))


def _named(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _named(f"{name}.{key}" if name else str(key), inner)


def _dtype(name: str, file: Path, tensor: torch.Tensor) -> np.dtype:
    try:
        return _array(tensor.new_empty(0)).dtype
    except TypeError as error:
        raise UserError(f"{name} in {file} is of dtype {tensor.dtype}, which NumPy lacks; convert it first") from error


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(BFLOAT16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
