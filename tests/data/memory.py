"""A chunk table and a neighbour table in memory, with the interface of the stored ones."""

from __future__ import annotations

import numpy as np

from retro_jax.config import ChunkConfig
from retro_jax.data.reader import RowReader

EOD = 99


class MemoryChunks:
    """The chunks of documents given as lists of token ids; one source unless ``sources`` gives documents a source each."""

    def __init__(self, documents: list[list[int]], chunk_len: int, source_documents: list[int] | None = None) -> None:
        self.documents = [np.asarray(d, np.int32) for d in documents]
        self.chunk_len, self.eod_id = chunk_len, EOD
        start, remaining, document, offset = [], [], [], 0
        for number, tokens in enumerate(self.documents):
            for first in range(0, len(tokens), chunk_len):
                start.append(offset + first)
                remaining.append(len(tokens) - first)
                document.append(number)
            offset += len(tokens) + 1
        self.start_N = np.asarray(start, np.int64)
        self.remaining_N = np.asarray(remaining, np.int32)
        self.document_N = np.asarray(document, np.int64)
        self.num_chunks, self.num_documents = len(start), len(documents)
        bounds = np.cumsum([0, *(source_documents or [len(documents)])])
        self.source_chunks = np.searchsorted(self.document_N, bounds)
        self.text = np.concatenate([np.append(d, EOD) for d in self.documents] + [np.zeros(1, np.int32)])

    def gather(self, chunk_ids, length, *, eod=False):
        chunk_ids = np.asarray(chunk_ids)
        if not self.num_chunks:
            return np.zeros((*chunk_ids.shape, length), np.int32), np.zeros(chunk_ids.shape, np.int32)
        at = np.maximum(chunk_ids, 0)
        lengths = np.where(chunk_ids < 0, 0, np.minimum(self.remaining_N[at] + eod, length)).astype(np.int32)
        where = np.minimum(self.start_N[at][..., None] + np.arange(length), len(self.text) - 1)
        return np.where(np.arange(length) < lengths[..., None], self.text[where], 0).astype(np.int32), lengths


class MemoryNeighbours:
    def __init__(self, ids_NS) -> None:
        self.ids_NS = np.asarray(ids_NS, np.int64)
        self.distances_NS = np.zeros(self.ids_NS.shape, np.float32)

    def select(self, chunk_ids, k, keep=None):
        chunk_ids = np.asarray(chunk_ids)
        return np.where(chunk_ids[..., None] < 0, -1, self.ids_NS[np.maximum(chunk_ids, 0), :k])

    def count_short(self, k, keep=None):
        return int((self.ids_NS[:, :k] < 0).any(axis=1).sum())


def memory_reader(table, neighbours=None, k=2, **settings):
    """A reader whose neighbours come from the same table."""
    chunks = ChunkConfig(chunk_len=table.chunk_len, num_neighbours=k, retrieved_len=2 * table.chunk_len)
    return RowReader(queries=table, database=table, neighbours=neighbours, chunks=chunks, **settings)
