"""Latent semantic analysis with a sketch of what it leaves over: TF-IDF as dense vectors, for dense indexes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from scipy.sparse import csr_matrix, vstack

from retro_jax.array_files import save_array
from retro_jax.config import RetrievalConfig
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.tfidf import TfidfEmbedder

# Of the dimensions, how many hold the leading singular directions, and the weight of the sketch beside them. Of the two
# chunks that 256 dimensions find nearest to a chunk of the standard library's documentation (18,836 of 32 tokens), the TF-IDF
# cosines are 81% of the best two's; with singular directions alone 64%.
LEADING_SHARE, SKETCH_WEIGHT = 0.25, 0.5
# N-grams of fewer training chunks are left out: they link hardly any, and would only add noise.
MIN_CHUNKS = 3
# Columns of TF-IDF that the directions read: those of the sample's most frequent n-grams, so that they fit in memory.
MAX_COLUMNS = 2**18
# Places of the sketch that an n-gram adds to.
SKETCH_PLACES = 4
READ_AT_ONCE = 4096
FILES = ("place", "directions", "sketch", "sketched_directions")


class LsaEmbedder:
    """Coordinates of TF-IDF on the leading singular directions of a random sample, beside a random projection of the rest of
    the vector, which keeps the rare n-grams that tell near-copies; L2-normalised.

    Source: Deerwester et al. 1990, "Indexing by latent semantic analysis"; the SVD is Halko et al. 2011, the projection the
    sparse one of Kane and Nelson 2014.
    """

    name: ClassVar[str] = "lsa"
    sparse: ClassVar[bool] = False
    one_process: ClassVar[bool] = False

    def __init__(
        self, tfidf: TfidfEmbedder, place_F: np.ndarray, directions_PA: np.ndarray, sketch_FS: np.ndarray, sketched_AE: np.ndarray
    ) -> None:
        self._tfidf, self._place_F, self._directions_PA, self._sketched_AE = tfidf, place_F, directions_PA, sketched_AE
        self._sketch_FE = _sketch_matrix(sketch_FS, sketched_AE.shape[1])

    @property
    def dim(self) -> int:
        """``lsa_dim``."""
        return self._directions_PA.shape[1] + self._sketched_AE.shape[1]

    @classmethod
    def dim_of(cls, config: RetrievalConfig) -> int:
        """``lsa_dim``."""
        return config.lsa_dim

    @classmethod
    def facts(cls, config: RetrievalConfig) -> Mapping:
        """TF-IDF's, the dimensions, the sample and its seed."""
        own = {"lsa_dim": config.lsa_dim, "lsa_train_chunks": config.lsa_train_chunks, "seed": config.seed}
        return {**TfidfEmbedder.facts(config), **own}

    @classmethod
    def fit(cls, config: RetrievalConfig, texts: ChunkTexts, folder: Path) -> Mapping:
        """Fit TF-IDF on all training chunks and the directions on a random sample.

        Writes TF-IDF's files; ``place.npy`` int32 [features], each column's row in ``directions.npy`` (-1 for none), float32
        [columns, leading]; ``sketch.npy`` int32 [features, 4], the places that a column adds to, from 1, negative where it
        subtracts, 0 for none; ``sketched_directions.npy``, the sketch of each direction.
        """
        from sklearn.utils.extmath import randomized_svd  # scikit-learn takes a second to import

        facts = dict(TfidfEmbedder.fit(config, texts, folder))
        rng = np.random.default_rng(config.seed)
        sample_NF = _sample(TfidfEmbedder.load(folder, cls.facts(config)), config, texts, rng)
        columns = _frequent_columns(sample_NF)
        place_F = np.full(config.features, -1, np.int32)
        place_F[columns] = np.arange(len(columns), dtype=np.int32)
        leading = min(int(config.lsa_dim * LEADING_SHARE), sample_NF.shape[0], len(columns))
        directions_PA, kept = np.zeros((len(columns), 0), np.float32), 0.0
        if leading:
            sample_NP = _select(sample_NF, place_F, len(columns))
            _, strengths_A, directions_AP = randomized_svd(sample_NP, leading, n_iter=4, random_state=config.seed)
            directions_PA = np.ascontiguousarray(directions_AP.T, np.float32)
            kept = float((strengths_A**2).sum() / sample_NF.multiply(sample_NF).sum())
        rest = config.lsa_dim - leading
        sketch_FS = rng.integers(1, rest + 1, (config.features, SKETCH_PLACES), np.int32)
        sketch_FS *= rng.choice(np.array([-1, 1], np.int32), sketch_FS.shape)
        sketch_FS[np.load(folder / "df.npy", mmap_mode="r") < MIN_CHUNKS] = 0
        sketched_AE = (_sketch_matrix(sketch_FS, rest)[columns].T @ directions_PA).T.astype(np.float32)
        for name, array in zip(FILES, (place_F, directions_PA, sketch_FS, sketched_AE), strict=True):
            save_array(folder / f"{name}.npy", array)
        facts |= {"sampled_chunks": sample_NF.shape[0], "projected_columns": len(columns)}
        return {**facts, "dim": config.lsa_dim, "leading_directions": leading, "energy_of_leading": kept}

    @classmethod
    def load(cls, folder: Path, facts: Mapping) -> Self:
        """From the files that :meth:`fit` wrote, memory-mapped."""
        return cls(TfidfEmbedder.load(folder, facts), *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in FILES))

    def embed(self, texts: list[str]) -> np.ndarray:
        """float32 [texts, lsa_dim], rows of unit length; zero for a text without n-grams that count."""
        vectors_NF = self._tfidf.embed(texts)
        leading_NA = _select(vectors_NF, self._place_F, len(self._directions_PA)) @ self._directions_PA
        # Sums over the directions in one order for each text, where a matrix product's order depends on their number.
        rest_NE = (vectors_NF @ self._sketch_FE).toarray() - np.einsum("na,ae->ne", leading_NA, self._sketched_AE)
        vectors_ND = np.concatenate([leading_NA, SKETCH_WEIGHT * rest_NE], axis=1).astype(np.float32)
        norms_N1 = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))[:, None]
        return np.divide(vectors_ND, norms_N1, out=np.zeros_like(vectors_ND), where=norms_N1 > 0)

    def embed_queries(self, texts: list[str]) -> np.ndarray:
        """:meth:`embed`."""
        return self.embed(texts)


def _sample(tfidf: TfidfEmbedder, config: RetrievalConfig, texts: ChunkTexts, rng: np.random.Generator) -> csr_matrix:
    chunks = texts.table("train").num_chunks
    wanted = min(config.lsa_train_chunks, chunks)
    ids = np.sort(rng.choice(chunks, wanted, replace=False, shuffle=False))
    parts = [tfidf.embed(texts.read_found("train", ids[at : at + READ_AT_ONCE])) for at in range(0, wanted, READ_AT_ONCE)]
    return vstack(parts, format="csr")


def _frequent_columns(sample_NF: csr_matrix) -> np.ndarray:
    """Columns of enough chunks, the most frequent first where there are too many, ascending."""
    chunks_F = np.bincount(sample_NF.indices, minlength=sample_NF.shape[1])
    columns = np.flatnonzero(chunks_F >= MIN_CHUNKS)
    order = np.argsort(-chunks_F[columns], kind="stable")[:MAX_COLUMNS]
    return np.sort(columns[order])


def _select(vectors_NF: csr_matrix, place_F: np.ndarray, columns: int) -> csr_matrix:
    """The columns of sparse rows that have a place."""
    places = place_F[vectors_NF.indices]
    kept = places >= 0
    starts = np.concatenate([[0], np.cumsum(kept)])[vectors_NF.indptr]
    return csr_matrix((vectors_NF.data[kept], places[kept], starts), shape=(vectors_NF.shape[0], columns))


def _sketch_matrix(sketch_FS: np.ndarray, places: int) -> csr_matrix:
    """The random projection as csr_matrix [features, places]: inner products are kept on average."""
    features, S = sketch_FS.shape
    values = (np.sign(sketch_FS) / np.sqrt(S)).astype(np.float32).reshape(-1)
    starts = np.arange(0, features * S + 1, S, dtype=np.int32)
    return csr_matrix((values, np.maximum(np.abs(sketch_FS).reshape(-1) - 1, 0), starts), shape=(features, places))
