"""Neighbours of text that is in no chunk table: looked up in the training database while a model is evaluated, or given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from retro_jax.config import ChunkConfig, Config
from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.overlap import longest_common_run

# Of so many chunks the neighbours are remembered: the answers to a question share its chunks.
REMEMBERED = 2**16

# The ids of chunks' tokens, each int32 [up to C] -> tokens int32 [chunks, K, R] and a bool mask of the same shape.
ChunkNeighbours = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]]


class DatabaseNeighbours:
    """The nearest training chunks of a chunk's text, with their continuations.

    The filters are those of training (``DataConfig.neighbour_sources`` and ``max_overlap``), with one difference: the overlap is
    with the chunk alone, for what comes after it is what is to be predicted. A chunk without text (BOS alone) has no neighbours.

    Args:
        config: its chunks, the filters, and how many neighbours are looked at where one applies (``RetrievalConfig.saved``).
        database: to be searched.
        tokenizer: turns the chunks into text.
    """

    def __init__(self, config: Config, database: Database, tokenizer: Tokenizer) -> None:
        self._chunks, self._data, self._saved = config.chunks, config.data, config.retrieval.saved
        self._database, self._tokenizer = database, tokenizer
        self._found: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def __call__(self, chunks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """See :data:`ChunkNeighbours`."""
        keys = [np.ascontiguousarray(chunk, np.int32).tobytes() for chunk in chunks]
        new = {key: chunk for key, chunk in zip(keys, chunks, strict=True) if key not in self._found}
        found = {key: self._found[key] for key in keys if key not in new}
        if new:
            found.update(zip(new, self._search(list(new.values())), strict=True))
        for key, ids_K in found.items():
            self._found[key] = ids_K
            self._found.move_to_end(key)
        while len(self._found) > REMEMBERED:
            self._found.popitem(last=False)
        ids_NK = np.stack([found[key] for key in keys]) if keys else np.zeros((0, self._chunks.num_neighbours), np.int64)
        tokens_NKR, lengths_NK = self._database.table.gather(ids_NK, self._chunks.retrieved_len)
        return tokens_NKR, np.arange(self._chunks.retrieved_len, dtype=np.int32) < lengths_NK[..., None]

    def _search(self, chunks: list[np.ndarray]) -> np.ndarray:
        K = self._chunks.num_neighbours
        filtered = self._data.neighbour_sources is not None or self._data.max_overlap is not None
        texts = self._tokenizer.decode_batch(chunks)
        asked = [number for number, text in enumerate(texts) if text.strip()]
        ids_NK = np.full((len(chunks), K), -1, np.int64)
        if asked and K:
            ids_QS, _ = self._database.nearest_chunks([texts[number] for number in asked], self._saved if filtered else K)
            if filtered:
                ids_QS = self._passing([chunks[number] for number in asked], ids_QS)
            ids_NK[asked] = ids_QS[:, :K]
        return ids_NK

    def _passing(self, chunks: list[np.ndarray], ids_QS: np.ndarray) -> np.ndarray:
        """The ids that pass the filters moved to the front, in their order, -1 behind them."""
        passes_QS = ids_QS >= 0
        if self._data.neighbour_sources is not None:
            passes_QS &= np.isin(self._database.table.sources(np.maximum(ids_QS, 0)), self._data.neighbour_sources)
        if self._data.max_overlap is not None:
            row_P, column_P = np.nonzero(passes_QS)
            lengths_Q = np.array([len(chunk) for chunk in chunks])
            chunk_QC = np.zeros((len(chunks), self._chunks.chunk_len), np.int32)
            for row, chunk in enumerate(chunks):
                chunk_QC[row, : len(chunk)] = chunk
            found_PR, found_lengths_P = self._database.table.gather(ids_QS[row_P, column_P], self._chunks.retrieved_len)
            runs_P = longest_common_run(chunk_QC[row_P], found_PR, lengths_Q[row_P], found_lengths_P)
            passes_QS[row_P, column_P] = runs_P <= int(self._data.max_overlap * self._chunks.chunk_len)
        order_QS = np.argsort(~passes_QS, axis=1, kind="stable")
        return np.take_along_axis(np.where(passes_QS, ids_QS, -1), order_QS, axis=1)


def given_neighbours(passages: Sequence[np.ndarray], chunks: ChunkConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The same texts for each of ``count`` chunks, the first K of them, cut to R tokens: int32 and bool [count, K, R]."""
    tokens_NKR = np.zeros((count, chunks.num_neighbours, chunks.retrieved_len), np.int32)
    mask_NKR = np.zeros(tokens_NKR.shape, bool)
    for place, passage in enumerate(passages[: chunks.num_neighbours]):
        kept = passage[: chunks.retrieved_len]
        tokens_NKR[:, place, : len(kept)], mask_NKR[:, place, : len(kept)] = kept, True
    return tokens_NKR, mask_NKR
