"""Safetensors files written as the tensors come: each goes to its place in its file at once, so that none is held."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retro_jax.array_files import write_array
from retro_jax.interop.files import DTYPES, INDEX, STEM, SUFFIX, Fact

SHARD_BYTES = 2**28
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
# A safetensors file: the header's length as uint64, the header (JSON, padded with spaces to this multiple), the tensors.
ALIGNED = 8


class SafetensorsShards:
    """Writes the tensors of ``facts`` into shards of at most ``shard_bytes`` (or one tensor), with an index."""

    def __init__(self, folder: Path, facts: Mapping[str, Fact], shard_bytes: int = SHARD_BYTES) -> None:
        self._facts, self._left = facts, set(facts)
        self._total = sum(fact.nbytes for fact in facts.values())
        shards: list[list[str]] = [[]]
        filled = 0
        for name, fact in facts.items():
            if shards[-1] and filled + fact.nbytes > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += fact.nbytes
        self._index = folder / INDEX if len(shards) > 1 else None
        self._places: dict[str, tuple[Path, int]] = {}
        for number, names in enumerate(shards):
            file = folder / (STEM + (f"-{number + 1:05d}-of-{len(shards):05d}" if self._index else "") + SUFFIX)
            self._places |= {name: (file, at) for name, at in start_file(file, {name: facts[name] for name in names}).items()}

    def write(self, name: str, tensor: np.ndarray) -> None:
        """One tensor, in any order."""
        (file, at), fact = self._places[name], self._facts[name]
        assert tensor.size * fact.dtype.itemsize == fact.nbytes
        with open(file, "r+b") as opened:
            opened.seek(at)
            write_array(opened, np.ascontiguousarray(tensor, fact.dtype).reshape(-1).view(np.uint8))
        self._left.remove(name)

    def finish(self) -> None:
        """Write the index, where there are several shards."""
        assert not self._left
        if self._index is not None:
            places = {name: file.name for name, (file, _) in self._places.items()}
            index = {"metadata": {"total_size": self._total}, "weight_map": places}
            self._index.write_text(json.dumps(index, indent=2) + "\n")


def start_file(path: Path, facts: Mapping[str, Fact]) -> dict[str, int]:
    """Write the header of a safetensors file, and leave room for its tensors, which are zeros until they are written.

    Returns:
        Where each tensor begins in the file: those of larger numbers first, so that all lie aligned, else in the given order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin, offsets = 0, {}
    for name, fact in sorted(facts.items(), key=lambda item: -item[1].dtype.itemsize):
        header[name] = {"dtype": CODES[fact.dtype], "shape": fact.shape, "data_offsets": (begin, begin + fact.nbytes)}
        offsets[name] = begin
        begin += fact.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    head = len(text).to_bytes(ALIGNED, "little") + text
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + begin)
    return {name: len(head) + offset for name, offset in offsets.items()}
