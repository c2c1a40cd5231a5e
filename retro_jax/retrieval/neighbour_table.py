"""Every chunk's neighbours, as found, and the choice among them that is made when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.artefact import open_artefact
from retro_jax.config import Split
from retro_jax.corpus.chunk_table import ChunkTable
from retro_jax.retrieval.overlap import longest_common_run

NEIGHBOURS = "neighbours"
ROWS_AT_ONCE = 2**18


@dataclass(frozen=True, kw_only=True)
class NeighbourFilter:
    """What a neighbour must be to be read.

    ``max_overlap``: it shares (with its continuation) no run of tokens longer than this fraction of the chunk length with the
    chunk or with the chunk after it. ``sources``: it comes from one of these sources of the corpus, by number. None: any.
    """

    max_overlap: float | None = None
    sources: tuple[int, ...] | None = None


KEEP_ALL = NeighbourFilter()


class NeighbourTable:
    """The neighbours of one split's chunks in the train split, memory-mapped.

    Attributes:
        ids_NS: int64 [chunks, saved], chunks of the train split, nearest first; -1 where there is none.
        distances_NS: float32 [chunks, saved], as the manifest's ``distance`` says; inf where there is none.
    """

    def __init__(self, path: Path, split: Split, queries: ChunkTable, database: ChunkTable, retrieved_len: int) -> None:
        self._opened_from = (Path(path), split, queries, database, retrieved_len)
        artefact = open_artefact(path, NEIGHBOURS)
        self.ids_NS = artefact.array(f"{split}.ids")
        self.distances_NS = artefact.array(f"{split}.distances")
        self._queries, self._database, self._retrieved_len = queries, database, retrieved_len

    def __reduce__(self) -> tuple[Any, ...]:
        return NeighbourTable, self._opened_from  # a copy in another process maps the files again

    @property
    def saved(self) -> int:
        """Neighbours kept a chunk (S)."""
        return self.ids_NS.shape[1]

    def __len__(self) -> int:
        return len(self.ids_NS)

    def select(
        self, chunk_ids: np.ndarray, k: int, *, keep: NeighbourFilter = KEEP_ALL, retrieved_len: int | None = None
    ) -> np.ndarray:
        """The ``k`` nearest neighbours of each chunk that pass the filter.

        Args:
            chunk_ids: int64 [...]; -1 for none.
            k: neighbours wanted, at most ``saved``.
            retrieved_len: tokens of a neighbour, the chunk and its continuation; None: as the table was opened with.

        Returns:
            int64 [..., k], nearest first; -1 where fewer are left.

        Raises:
            ValueError: ``k`` is above ``saved``.
        """
        if not 0 <= k <= self.saved:
            raise ValueError(
                f"k={k} is not in 0 to {self.saved}, the neighbours saved; build them with a larger RetrievalConfig.saved"
            )
        ids = np.asarray(chunk_ids, np.int64)
        flat_N = ids.reshape(-1)
        found_NS = np.full((len(flat_N), self.saved), -1, np.int64)
        found_NS[flat_N >= 0] = self.ids_NS[flat_N[flat_N >= 0]]
        if keep == KEEP_ALL:
            chosen_NK = found_NS[:, :k]
        else:
            chosen_NK = self._choose(flat_N, found_NS, k, keep, retrieved_len or self._retrieved_len)
        return np.ascontiguousarray(chosen_NK).reshape(*ids.shape, k)

    def count_short(self, k: int, *, keep: NeighbourFilter = KEEP_ALL) -> int:
        """How many chunks are left with fewer than ``k`` neighbours."""
        short = 0
        for start in range(0, len(self), ROWS_AT_ONCE):
            ids_N = np.arange(start, min(start + ROWS_AT_ONCE, len(self)))
            short += int((self.select(ids_N, k, keep=keep) < 0).any(axis=1).sum())
        return short

    def overlaps(self, chunk_ids_N: np.ndarray, neighbour_ids_N: np.ndarray, *, retrieved_len: int | None = None) -> np.ndarray:
        """See :func:`shared_runs`."""
        return shared_runs(self._queries, self._database, chunk_ids_N, neighbour_ids_N, retrieved_len or self._retrieved_len)

    def _passes(self, chunk_ids_N: np.ndarray, ids_N: np.ndarray, keep: NeighbourFilter, retrieved_len: int) -> np.ndarray:
        passed_N = np.ones(len(ids_N), bool)
        if keep.sources is not None:
            passed_N = np.isin(self._database.sources(ids_N), keep.sources)
        if keep.max_overlap is not None:
            left = np.flatnonzero(passed_N)
            runs = self.overlaps(chunk_ids_N[left], ids_N[left], retrieved_len=retrieved_len)
            passed_N[left] = runs <= int(keep.max_overlap * self._queries.chunk_len)
        return passed_N

    def _choose(
        self, chunk_ids_N: np.ndarray, found_NS: np.ndarray, k: int, keep: NeighbourFilter, retrieved_len: int
    ) -> np.ndarray:
        """Candidates are looked at from the nearest on, k columns at a time, for the chunks that still lack some."""
        chosen_NK = np.full((len(found_NS), k), -1, np.int64)
        count_N = np.zeros(len(found_NS), np.int64)
        for first in range(0, self.saved if k else 0, max(k, 1)):
            lacking = np.flatnonzero((count_N < k) & (found_NS[:, first] >= 0))
            if len(lacking) == 0:
                break
            columns_NW = found_NS[lacking, first : first + k]
            row, column = np.nonzero(columns_NW >= 0)
            passed_NW = np.zeros(columns_NW.shape, bool)
            passed_NW[row, column] = self._passes(chunk_ids_N[lacking][row], columns_NW[row, column], keep, retrieved_len)
            place_NW = count_N[lacking][:, None] + np.cumsum(passed_NW, axis=1) - 1
            row, column = np.nonzero(passed_NW & (place_NW < k))
            chosen_NK[lacking[row], place_NW[row, column]] = columns_NW[row, column]
            count_N[lacking] = np.minimum(k, count_N[lacking] + passed_NW.sum(axis=1))
        return chosen_NK


def shared_runs(
    queries: ChunkTable, database: ChunkTable, chunk_ids_N: np.ndarray, neighbour_ids_N: np.ndarray, retrieved_len: int
) -> np.ndarray:
    """The longest run of tokens, int32 [N], that a neighbour (with its continuation) shares with the chunk or with the chunk
    after it; 0 where either id is -1. A run across both of the chunks counts by its parts."""
    C = queries.chunk_len
    neighbour_NR, neighbour_len_N = database.gather(neighbour_ids_N, retrieved_len)
    tokens_N2C, length_N = queries.gather(chunk_ids_N, 2 * C)
    chunk_N = longest_common_run(tokens_N2C[:, :C], neighbour_NR, np.minimum(length_N, C), neighbour_len_N)
    after_N = longest_common_run(tokens_N2C[:, C:], neighbour_NR, np.maximum(length_N - C, 0), neighbour_len_N)
    return np.maximum(chunk_N, after_N)
