"""Latent semantic analysis: TF-IDF projected on the leading singular vectors of a sample, for dense indexes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from scipy.sparse import csr_matrix, vstack
from sklearn.utils.extmath import randomized_svd

from retro_jax.config import RetrievalConfig
from retro_jax.errors import BadInput
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.tfidf import TfidfEmbedder

# Columns of the projection: those of the sample's most frequent n-grams. Rarer ones say little about other chunks, and the
# projection (columns x dim) has to fit in memory.
MAX_COLUMNS = 2**18
# An n-gram of a single sampled chunk would only add that chunk's direction.
MIN_CHUNKS = 2
READ_AT_ONCE = 4096


class LsaEmbedder:
    """Rows of TF-IDF times the right singular vectors of a random sample of them, L2-normalised.

    Source: Deerwester et al. 1990, "Indexing by latent semantic analysis"; the SVD is Halko et al. 2011.
    """

    name: ClassVar[str] = "lsa"
    sparse: ClassVar[bool] = False

    def __init__(self, tfidf: TfidfEmbedder, place_F: np.ndarray, projection_PD: np.ndarray) -> None:
        self._tfidf, self._place_F, self._projection_PD = tfidf, place_F, projection_PD

    @property
    def dim(self) -> int:
        """Dimensions kept: ``lsa_dim``, or fewer where the sample has a lower rank."""
        return self._projection_PD.shape[1]

    @classmethod
    def facts(cls, config: RetrievalConfig) -> Mapping:
        """TF-IDF's, the dimensions, the sample and its seed."""
        own = {"lsa_dim": config.lsa_dim, "lsa_train_chunks": config.lsa_train_chunks, "seed": config.seed}
        return {**TfidfEmbedder.facts(config), **own}

    @classmethod
    def fit(cls, config: RetrievalConfig, texts: ChunkTexts, folder: Path) -> Mapping:
        """Fit TF-IDF on all training chunks and the projection on a random sample; writes ``idf.npy``, ``place.npy`` (each
        column's row in the projection, -1 for none) and ``projection.npy``."""
        facts = dict(TfidfEmbedder.fit(config, texts, folder))
        sample_NF = _sample(TfidfEmbedder.load(folder, cls.facts(config)), config, texts)
        columns = _frequent_columns(sample_NF)
        place_F = np.full(config.features, -1, np.int32)
        place_F[columns] = np.arange(len(columns), dtype=np.int32)
        rank = min(config.lsa_dim, sample_NF.shape[0], len(columns))
        if rank == 0:
            raise BadInput(
                f"RetrievalConfig.embedder='lsa' finds no word that occurs in two of the {sample_NF.shape[0]} training chunks it "
                "learns from; give more documents, or use 'tfidf'"
            )
        sample_NP = _select(sample_NF, place_F, len(columns))
        _, strengths_D, directions_DP = randomized_svd(sample_NP, rank, n_iter=4, random_state=config.seed)
        kept = float((strengths_D**2).sum() / sample_NF.multiply(sample_NF).sum())
        np.save(folder / "projection.npy", np.ascontiguousarray(directions_DP.T, np.float32))
        np.save(folder / "place.npy", place_F)
        facts |= {"sampled_chunks": sample_NF.shape[0], "projected_columns": len(columns)}
        return {**facts, "dim": rank, "energy_kept": kept}

    @classmethod
    def load(cls, folder: Path, facts: Mapping) -> Self:
        """From the files that :meth:`fit` wrote, memory-mapped."""
        place_F, projection_PD = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("place", "projection"))
        return cls(TfidfEmbedder.load(folder, facts), place_F, projection_PD)

    def embed(self, texts: list[str]) -> np.ndarray:
        """float32 [texts, dim], rows of unit length; zero where no n-gram of the projection occurs."""
        vectors_ND = _select(self._tfidf.embed(texts), self._place_F, len(self._projection_PD)) @ self._projection_PD
        norms_N1 = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))[:, None]
        return np.divide(vectors_ND, norms_N1, out=np.zeros_like(vectors_ND), where=norms_N1 > 0)


def _sample(tfidf: TfidfEmbedder, config: RetrievalConfig, texts: ChunkTexts) -> csr_matrix:
    chunks = texts.table("train").num_chunks
    wanted = min(config.lsa_train_chunks, chunks)
    ids = np.sort(np.random.default_rng(config.seed).choice(chunks, wanted, replace=False, shuffle=False))
    parts = [tfidf.embed(texts.read("train", ids[at : at + READ_AT_ONCE])) for at in range(0, wanted, READ_AT_ONCE)]
    return vstack(parts, format="csr")


def _frequent_columns(sample_NF: csr_matrix) -> np.ndarray:
    """Columns of at least two chunks, the most frequent first where there are too many, ascending."""
    chunks_F = np.bincount(sample_NF.indices, minlength=sample_NF.shape[1])
    columns = np.flatnonzero(chunks_F >= MIN_CHUNKS)
    order = np.argsort(-chunks_F[columns], kind="stable")[:MAX_COLUMNS]
    return np.sort(columns[order])


def _select(vectors_NF: csr_matrix, place_F: np.ndarray, columns: int) -> csr_matrix:
    """The projection's columns of sparse rows."""
    places = place_F[vectors_NF.indices]
    kept = places >= 0
    starts = np.concatenate([[0], np.cumsum(kept)])[vectors_NF.indptr]
    return csr_matrix((vectors_NF.data[kept], places[kept], starts), shape=(vectors_NF.shape[0], columns))
