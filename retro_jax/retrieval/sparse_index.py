"""Exact search of sparse vectors: their transpose as inverted lists, multiplied a block of queries at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sparse_dot_topn import sp_matmul_topn

from retro_jax.array_files import save_array
from retro_jax.artefact import Artefact
from retro_jax.config import RetrievalConfig
from retro_jax.errors import BadInput
from retro_jax.retrieval.memory import in_words, memory_of_machine
from retro_jax.retrieval.metric import TIE_WIDTH
from retro_jax.retrieval.vectors import SparseVectors

# An entry of a sparse vector: its column or row (int32) and its value (float32).
ENTRY_BYTES = 8
MAX_ENTRIES = 2**31 - 1
# Results of one product that are in memory at a time (an id and a value each).
RESULTS_AT_ONCE = 2**21


@dataclass(frozen=True)
class SparseIndex:
    """The database as csr_matrix [dim, chunks]: for each column the chunks that have it."""

    lists_FN: csr_matrix

    @classmethod
    def open(cls, artefact: Artefact) -> SparseIndex:
        """Memory-mapped, so that the processes of a machine share it. Mapped copy-on-write and never written: the product
        takes writable arrays only."""
        data, chunks, starts = (np.load(artefact.path / f"{name}.npy", mmap_mode="c") for name in ("data", "chunks", "starts"))
        return cls(csr_matrix((data, chunks, starts), shape=(artefact.summary["dim"], artefact.summary["chunks"])))

    @property
    def num_chunks(self) -> int:
        """Chunks of the database."""
        return self.lists_FN.shape[1]

    def search(self, queries: csr_matrix, width: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`retro_jax.retrieval.index.Index`. A chunk without a common column is no neighbour at any width."""
        width = min(width, self.num_chunks)
        ids_QW = np.full((queries.shape[0], width), -1, np.int64)
        distances_QW = np.full((queries.shape[0], width), np.inf, np.float32)
        rows_at_once = max(1, RESULTS_AT_ONCE // width)
        for start in range(0, queries.shape[0], rows_at_once):
            best = sp_matmul_topn(queries[start : start + rows_at_once], self.lists_FN, top_n=width)
            found_Q = np.diff(best.indptr)
            rows = np.repeat(np.arange(start, start + len(found_Q)), found_Q)
            places = np.arange(best.indptr[-1]) - np.repeat(best.indptr[:-1], found_Q)
            ids_QW[rows, places] = best.indices[: len(rows)]
            distances_QW[rows, places] = 1 - best.data[: len(rows)]
        return ids_QW, distances_QW

    def rounding(self, queries: csr_matrix, farthest_Q: np.ndarray) -> np.ndarray:
        """See :class:`retro_jax.retrieval.index.Index`."""
        return np.full(len(farthest_Q), TIE_WIDTH, np.float32)


def build_sparse_index(config: RetrievalConfig, database: SparseVectors, folder: Path) -> Mapping:
    """Transpose the database: ``starts.npy`` int32 [dim + 1], ``chunks.npy`` int32, ``data.npy`` float32."""
    refuse_too_large(len(database.data), len(database), config.workers)
    starts = np.concatenate([[0], database.row_ends_N]).astype(np.int32)
    lists = csr_matrix((database.data, database.columns, starts), shape=(len(database), database.dim)).tocsc()
    save_array(folder / "starts.npy", lists.indptr)
    save_array(folder / "chunks.npy", lists.indices)
    save_array(folder / "data.npy", lists.data)
    facts = {"chunks": len(database), "dim": database.dim, "entries": len(database.data)}
    return {**facts, "bytes": len(database.data) * ENTRY_BYTES, "search": "exact"}


def memory_needed(entries: int, chunks: int, workers: int) -> int:
    """Bytes that building and searching the index of so many entries takes: the database by chunk and by column, and in each
    process a running sum for every chunk and its results."""
    return 2 * entries * ENTRY_BYTES + workers * (chunks * 12 + RESULTS_AT_ONCE * 24)


def refuse_too_large(entries: int, chunks: int, workers: int) -> int:
    """The memory that an index of so many entries needs, in bytes.

    Raises:
        UserError: this machine has less, or the entries are too many for 32-bit positions.
    """
    needed, there = memory_needed(entries, chunks, workers), memory_of_machine()
    if needed > there or entries > MAX_ENTRIES:
        limit = f"this machine has {in_words(there)}" if needed > there else f"its {entries} entries are above {MAX_ENTRIES}"
        raise BadInput(
            f"RetrievalConfig.embedder='tfidf' is searched exactly in memory; {chunks} training chunks need about "
            f"{in_words(needed)}, but {limit}; use RetrievalConfig.embedder='lsa'"
        )
    return needed
