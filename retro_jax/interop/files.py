"""Named tensors in files, read one at a time, so that memory is bounded by a tensor and not by a model."""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from retro_jax.errors import UserError

STEM, SUFFIX = "model", ".safetensors"
INDEX = f"{STEM}{SUFFIX}.index.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32}
DTYPES |= {"I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}


class Fact(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """Tensors by name."""

    @property
    def facts(self) -> Mapping[str, Fact]:
        """All tensors, with their shapes and dtypes."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        ...


class SafetensorsSource:
    """One safetensors file, or a folder of them with or without an index."""

    def __init__(self, path: Path) -> None:
        files = [path] if path.is_file() else sorted(path.glob(f"*{SUFFIX}"))
        if not files:
            raise UserError(f"{path} holds no {SUFFIX} file; name a folder or a file that does")
        self._files: dict[str, Path] = {}
        self.facts: dict[str, Fact] = {}
        for file in files:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    part = tensors.get_slice(name)
                    if (dtype := part.get_dtype()) not in DTYPES:
                        raise UserError(f"{name} in {file} is of dtype {dtype}; those that can be read are {', '.join(DTYPES)}")
                    self.facts[name] = Fact(tuple(part.get_shape()), np.dtype(DTYPES[dtype]))
                    self._files[name] = file
        _refuse_missing_shards(path, set(self.facts))

    def read(self, name: str) -> np.ndarray:
        with _opened(self._files[name]) as tensors:
            return tensors.get_tensor(name)


class NpzSource:
    """A NumPy archive."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.facts: dict[str, Fact] = {}
        with _archive(path) as archive:
            for member in archive.namelist():
                self.facts[member.removesuffix(".npy")] = _header(archive, member)

    def read(self, name: str) -> np.ndarray:
        with _archive(self._path) as archive, archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)


class MemorySource:
    """Tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.facts = {name: Fact(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is at ``path`` when the block ends, and nowhere if it fails.

    Raises:
        UserError: something is there already.
    """
    if path.exists():
        raise UserError(f"--output {path} exists; name a folder that does not")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial)
        raise


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a NumPy archive ({error}); it is truncated or corrupted") from error


def _header(archive: zipfile.ZipFile, member: str) -> Fact:
    """Shape and dtype of an array, of which only the header is read."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return Fact(shape, dtype)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="np") as tensors:
            yield tensors
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); it is truncated or corrupted") from error


def _refuse_missing_shards(path: Path, there: set[str]) -> None:
    index = path / INDEX
    if path.is_dir() and index.exists():
        places = json.loads(index.read_text())["weight_map"]
        if missing := sorted(set(places) - there):
            raise UserError(
                f"{path} lacks {missing[0]} and {len(missing) - 1} more tensors of its index; {places[missing[0]]} is not whole"
            )
