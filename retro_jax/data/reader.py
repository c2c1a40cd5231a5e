"""Reads rows with the neighbours that stand in the neighbour table, another chunk's, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retro_jax.config import ChunkConfig, Config, Split
from retro_jax.data.rows import LookedUp, look_up, make_batch, segments_of
from retro_jax.retrieval.neighbour_table import KEEP_ALL, NeighbourFilter

if TYPE_CHECKING:
    from retro_jax.corpus.chunk_table import ChunkTable
    from retro_jax.data.batch import Batch
    from retro_jax.prepare import Prepared
    from retro_jax.retrieval.neighbour_table import NeighbourTable


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """The tables behind the rows of one split.

    ``queries`` holds the rows' chunks, ``database`` the train split's, which all neighbours come from. ``neighbours`` None
    reads rows without (K = 0), for a plain GPT. ``donors`` int64 [chunks]: whose neighbours each chunk gets; None: its own;
    -1: none (masked).
    """

    queries: ChunkTable
    database: ChunkTable
    neighbours: NeighbourTable | None
    chunks: ChunkConfig
    keep: NeighbourFilter = KEEP_ALL
    donors: np.ndarray | None = None

    def read(self, chunk_ids_BL: np.ndarray, segments_BL: np.ndarray | None = None, scored_BL: np.ndarray | None = None) -> Batch:
        """One batch; see :func:`retro_jax.data.rows.make_batch`. ``segments_BL`` None: runs of one document."""
        return make_batch(self.look_up(chunk_ids_BL, segments_BL), scored_BL)

    def look_up(self, chunk_ids_BL: np.ndarray, segments_BL: np.ndarray | None = None) -> LookedUp:
        """The text that a batch is made of."""
        return look_up(
            chunk_ids_BL,
            segments_of(chunk_ids_BL, self.queries.document_N) if segments_BL is None else segments_BL,
            self._neighbour_ids(chunk_ids_BL),
            queries=self.queries,
            database=self.database,
            retrieved_len=self.chunks.retrieved_len,
        )

    def _neighbour_ids(self, chunk_ids_BL: np.ndarray) -> np.ndarray:
        if self.neighbours is None:
            return np.zeros((*chunk_ids_BL.shape, 0), np.int64)
        if self.donors is not None:
            chunk_ids_BL = np.where(chunk_ids_BL < 0, -1, self.donors[np.maximum(chunk_ids_BL, 0)])
        return self.neighbours.select(chunk_ids_BL, self.chunks.num_neighbours, keep=self.keep)


def open_reader(
    config: Config, prepared: Prepared, split: Split, *, neighbours: bool, donors: np.ndarray | None = None
) -> RowReader:
    """The reader of a split's rows by ``DataConfig``: with the neighbours that pass its filters, or with none."""
    return RowReader(
        queries=prepared.tables[split],
        database=prepared.tables["train"],
        neighbours=prepared.neighbours[split] if neighbours else None,
        chunks=config.chunks,
        keep=neighbour_filter(config),
        donors=donors,
    )


def neighbour_filter(config: Config) -> NeighbourFilter:
    """Which of the neighbours found are read."""
    return NeighbourFilter(max_overlap=config.data.max_overlap, sources=config.data.neighbour_sources)
