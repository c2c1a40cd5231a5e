"""A chunk table in memory, made from documents of token ids: what properties are tested on without writing files."""

from __future__ import annotations

import numpy as np


class MemoryTable:
    """The interface of :class:`retro_jax.corpus.chunk_table.ChunkTable` that retrieval uses."""

    def __init__(self, documents: list[list[int]], chunk_len: int) -> None:
        self.chunk_len = chunk_len
        self.documents = [np.array(document, np.int32) for document in documents]
        places = [(d, at) for d, document in enumerate(documents) for at in range(0, len(document), chunk_len)]
        self.document_N = np.array([d for d, _ in places], np.int64)
        self._at_N = np.array([at for _, at in places], np.int64)
        self.remaining_N = np.array([len(documents[d]) - at for d, at in places], np.int32)
        self.num_chunks = len(places)

    def gather(self, chunk_ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        flat = np.asarray(chunk_ids).reshape(-1)
        tokens, lengths = np.zeros((len(flat), length), np.int32), np.zeros(len(flat), np.int32)
        for row, chunk in enumerate(flat):
            if chunk >= 0:
                text = self.documents[self.document_N[chunk]][self._at_N[chunk] :][:length]
                tokens[row, : len(text)], lengths[row] = text, len(text)
        return tokens.reshape(*np.shape(chunk_ids), length), lengths.reshape(np.shape(chunk_ids))
