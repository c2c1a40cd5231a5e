"""What the encoder reads: neighbours that a database has for a text, or passages that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from retro_jax.config import ChunkConfig
from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.neighbour_table import KEEP_ALL, NeighbourFilter
from retro_jax.retrieval.overlap import longest_common_run


class Found(NamedTuple):
    """The neighbours of Q texts, nearest first."""

    tokens_QKR: np.ndarray
    """int32; 0 where masked."""
    mask_QKR: np.ndarray
    """bool: False where a neighbour is missing or its document has ended."""
    ids_QK: np.ndarray
    """int64: which training chunk it is, -1 where it is missing."""
    distances_QK: np.ndarray
    """float32; inf where it is missing."""


class Retriever(Protocol):
    """What answers while text is written; called from a thread of its own."""

    def find(self, queries: Sequence[np.ndarray]) -> Found:
        """The neighbours of texts of at most chunk_len tokens each (int32, without padding)."""
        ...


class DatabaseRetriever:
    """The run's training database, with the filters that training reads neighbours through.

    Args:
        database: opened.
        tokenizer: of the model; the database's chunks have the same.
        chunks: how many neighbours, and how long.
        keep: which of those found are read. Of an overlap the text itself is looked at; what follows it is not known yet.
        saved: how many are looked at where some may be filtered out.
    """

    def __init__(
        self, database: Database, tokenizer: Tokenizer, chunks: ChunkConfig, keep: NeighbourFilter = KEEP_ALL, saved: int = 20
    ) -> None:
        self.database, self._tokenizer, self._chunks, self._keep = database, tokenizer, chunks, keep
        self._wanted = chunks.num_neighbours if keep == KEEP_ALL else max(saved, chunks.num_neighbours)

    def find(self, queries: Sequence[np.ndarray]) -> Found:
        """See :class:`Retriever`."""
        texts = self._tokenizer.decode_batch(queries)
        ids_QS, distances_QS = self.database.nearest_chunks(texts, self._wanted)
        ids_QS[[not text.strip() for text in texts]] = -1  # BOS alone: there is nothing to look for
        if self._keep != KEEP_ALL:
            ids_QS = np.where(self._passes(queries, ids_QS), ids_QS, -1)
        first_QK = np.argsort(ids_QS < 0, axis=1, kind="stable")[:, : self._chunks.num_neighbours]
        ids_QK, distances_QK = (np.take_along_axis(a, first_QK, axis=1) for a in (ids_QS, distances_QS))
        tokens_QKR, lengths_QK = self.database.table.gather(ids_QK, self._chunks.retrieved_len)
        mask_QKR = np.arange(self._chunks.retrieved_len, dtype=np.int32) < lengths_QK[..., None]
        return Found(tokens_QKR, mask_QKR, ids_QK, np.where(ids_QK < 0, np.float32(np.inf), distances_QK))

    def _passes(self, queries: Sequence[np.ndarray], ids_QS: np.ndarray) -> np.ndarray:
        passed_QS, table = ids_QS >= 0, self.database.table
        if self._keep.sources is not None:
            passed_QS &= np.isin(table.sources(np.maximum(ids_QS, 0)), self._keep.sources)
        if self._keep.max_overlap is not None:
            query, rank = np.nonzero(passed_QS)
            tokens_NR, lengths_N = table.gather(ids_QS[query, rank], self._chunks.retrieved_len)
            texts_QC = padded(queries, table.chunk_len)
            sizes_Q = np.array([len(text) for text in queries])
            runs_N = longest_common_run(texts_QC[query], tokens_NR, sizes_Q[query], lengths_N)
            passed_QS[query, rank] = runs_N <= int(self._keep.max_overlap * table.chunk_len)
        return passed_QS


def padded(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """int32 [rows, length]: each row's first tokens, then zeros."""
    together = np.zeros((len(rows), length), np.int32)
    for number, row in enumerate(rows):
        together[number, : len(row)] = row[:length]
    return together


def chunks_of(tokens: np.ndarray, chunk_len: int) -> list[np.ndarray]:
    """A text cut into chunks of which the last is full: the first takes what is left."""
    first = (len(tokens) - 1) % chunk_len + 1
    return [tokens[:first], *(tokens[start : start + chunk_len] for start in range(first, len(tokens), chunk_len))]
