"""Named tensors in files: read one at a time, written in shards, so that memory is bounded by a shard and not by a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from retro_jax.errors import UserError

SHARD_BYTES = 2**28
STEM, SUFFIX = "model", ".safetensors"
INDEX = f"{STEM}{SUFFIX}.index.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32}
DTYPES |= {"U8": np.uint8, "BOOL": np.bool_}


class Fact(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype


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
    """A NumPy archive; ``prefix`` is taken off the names, and other arrays are left out."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._path, self._prefix = path, prefix
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in file.files if name.startswith(prefix)]
            self.facts = {name.removeprefix(prefix): Fact(file[name].shape, file[name].dtype) for name in names}

    def read(self, name: str) -> np.ndarray:
        with np.load(self._path, allow_pickle=False) as file:
            return file[self._prefix + name]


class MemorySource:
    """Tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.facts = {name: Fact(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]


class SafetensorsShards:
    """Writes tensors, in the order of ``facts``, into shards of at most ``shard_bytes`` (or one tensor), with an index."""

    def __init__(self, folder: Path, facts: Mapping[str, Fact], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._facts = folder, facts
        self._shards: list[list[str]] = [[]]
        filled = 0
        for name, fact in facts.items():
            size = _size(fact)
            if self._shards[-1] and filled + size > shard_bytes:
                self._shards.append([])
                filled = 0
            self._shards[-1].append(name)
            filled += size
        self._held: dict[str, np.ndarray] = {}
        self._number = 0

    def write(self, name: str, tensor: np.ndarray) -> None:
        """The next tensor; its shard is written when it is whole."""
        fact = self._facts[name]
        self._held[name] = np.asarray(tensor, dtype=fact.dtype, order="C").reshape(fact.shape)
        if list(self._held) == self._shards[self._number]:
            file = self._folder / self._file(self._number)
            save_file(self._held, file, metadata={"format": "pt"})
            file.chmod(0o644)  # it is made for its owner alone
            self._held = {}
            self._number += 1

    def finish(self) -> None:
        """Write the index, where there are several shards."""
        assert not self._held and self._number == len(self._shards)
        if len(self._shards) > 1:
            places = {name: self._file(number) for number, names in enumerate(self._shards) for name in names}
            total = sum(_size(fact) for fact in self._facts.values())
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _file(self, number: int) -> str:
        return STEM + (f"-{number + 1:05d}-of-{len(self._shards):05d}" if len(self._shards) > 1 else "") + SUFFIX


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


def _size(fact: Fact) -> int:
    return int(np.prod(fact.shape, dtype=np.int64)) * fact.dtype.itemsize
