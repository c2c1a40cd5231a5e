"""The weightless embedder: TF-IDF of hashed word n-grams, with weights fitted on the training chunks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from scipy.sparse import csr_matrix

from retro_jax.array_files import save_array
from retro_jax.blocks import block_arrays, keep_blocks_of, run_blocks
from retro_jax.config import RetrievalConfig
from retro_jax.retrieval.chunk_texts import ChunkTexts

if TYPE_CHECKING:  # it takes a second to import, and most commands embed nothing
    from sklearn.feature_extraction.text import HashingVectorizer


class TfidfEmbedder:
    """Sublinear term frequency (1 + ln tf) times ln((1 + n) / (1 + df)) + 1 over ``features`` hashed columns, L2-normalised
    (scikit-learn's smooth IDF; lower-cased words of two characters and more)."""

    name: ClassVar[str] = "tfidf"
    sparse: ClassVar[bool] = True
    one_process: ClassVar[bool] = False

    def __init__(self, max_ngram: int, idf_F: np.ndarray) -> None:
        self._count = _counter(len(idf_F), max_ngram)
        self._idf_F = idf_F

    @property
    def dim(self) -> int:
        """Hashed columns."""
        return len(self._idf_F)

    @classmethod
    def dim_of(cls, config: RetrievalConfig) -> int:
        """Hashed columns."""
        return config.features

    @classmethod
    def facts(cls, config: RetrievalConfig) -> Mapping:
        """Columns and the longest n-gram."""
        return {"features": config.features, "max_ngram": config.max_ngram}

    @classmethod
    def fit(cls, config: RetrievalConfig, texts: ChunkTexts, folder: Path) -> Mapping:
        """Count in blocks in how many training chunks each column occurs: ``df.npy`` int64; the weights: ``idf.npy`` float32."""
        chunks = texts.table("train").num_chunks
        starts = range(0, chunks, config.block_chunks)
        tasks = ((texts, start, min(start + config.block_chunks, chunks), config.features, config.max_ngram) for start in starts)
        keep_blocks_of(folder, config.block_chunks)
        blocks = run_blocks(
            folder,
            _count_chunks,
            tasks,
            workers=config.workers,
            description="TF-IDF weights",
            total=len(starts),
            executor=config.executor,
            describe=lambda task: texts.table("train").describe(*task[1:3]),
        )
        df_F = np.zeros(config.features, np.int64)
        for number in range(blocks):
            block = block_arrays(folder, number)
            df_F[block["columns"]] += block["chunks"]
        save_array(folder / "df.npy", df_F)
        save_array(folder / "idf.npy", (np.log((1 + chunks) / (1 + df_F)) + 1).astype(np.float32))
        return {"chunks": chunks, "columns_used": int((df_F > 0).sum())}

    @classmethod
    def load(cls, folder: Path, facts: Mapping) -> Self:
        """From ``idf.npy``."""
        return cls(facts["max_ngram"], np.load(folder / "idf.npy", mmap_mode="r"))

    def embed(self, texts: list[str]) -> csr_matrix:
        """float32 csr_matrix [texts, features], rows of unit length; a text without words has an empty row."""
        from sklearn.preprocessing import normalize

        vectors_NF = self._count.transform(texts)
        vectors_NF.data = ((1 + np.log(vectors_NF.data)) * self._idf_F[vectors_NF.indices]).astype(np.float32)
        return normalize(vectors_NF, copy=False)

    def embed_queries(self, texts: list[str]) -> csr_matrix:
        """:meth:`embed`."""
        return self.embed(texts)


def count_ngrams(texts: list[str], features: int, max_ngram: int) -> csr_matrix:
    """How often each hashed n-gram occurs in each text, float32 [texts, features]."""
    return _counter(features, max_ngram).transform(texts)


def _counter(features: int, max_ngram: int) -> HashingVectorizer:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=features, ngram_range=(1, max_ngram), alternate_sign=False, norm=None, dtype=np.float32)


def _count_chunks(texts: ChunkTexts, start: int, stop: int, features: int, max_ngram: int) -> dict[str, np.ndarray]:
    counts_NF = count_ngrams(texts.read_found("train", np.arange(start, stop)), features, max_ngram)
    columns, chunks = np.unique(counts_NF.indices, return_counts=True)
    return {"columns": columns, "chunks": chunks}
