"""The vectors of all chunks on disk, read as memory-mapped rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from scipy.sparse import csr_matrix

from retro_jax.artefact import Artefact
from retro_jax.config import Split

Vectors: TypeAlias = np.ndarray | csr_matrix


@dataclass(frozen=True)
class DenseVectors:
    """float32 [chunks, dim], memory-mapped."""

    path: Path

    @functools.cached_property
    def vectors_ND(self) -> np.ndarray:
        """The whole array, mapped; a copy in another process maps it anew."""
        return np.load(self.path, mmap_mode="r")

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return DenseVectors, (self.path,)

    def __len__(self) -> int:
        return len(self.vectors_ND)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, in memory."""
        return np.array(self.vectors_ND[start:stop])


@dataclass(frozen=True)
class SparseVectors:
    """The three arrays of a csr_matrix [chunks, dim], memory-mapped; ``row_ends_N`` are running counts from the first row on."""

    data: np.ndarray
    columns: np.ndarray
    row_ends_N: np.ndarray
    dim: int

    def __len__(self) -> int:
        return len(self.row_ends_N)

    def rows(self, start: int, stop: int) -> csr_matrix:
        """Rows ``start`` to ``stop``, in memory."""
        first = int(self.row_ends_N[start - 1]) if start else 0
        last = int(self.row_ends_N[stop - 1]) if stop else 0
        starts = np.concatenate([[0], self.row_ends_N[start:stop] - first]).astype(np.int32)
        data, columns = np.array(self.data[first:last]), np.array(self.columns[first:last])
        return csr_matrix((data, columns, starts), shape=(stop - start, self.dim))


def open_vectors(artefact: Artefact, split: Split) -> DenseVectors | SparseVectors:
    """The vectors of one split."""
    if artefact.summary["sparse"]:
        data, columns, row_ends_N = (artefact.array(f"{split}.{name}") for name in ("data", "columns", "row_ends"))
        return SparseVectors(data, columns, row_ends_N, artefact.summary["dim"])
    return DenseVectors(artefact.path / f"{split}.vectors.npy")
