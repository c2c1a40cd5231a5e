"""What finds the nearest database chunks of vectors: the seam, and the choice between its three forms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from retro_jax.artefact import Artefact, build_artefact
from retro_jax.config import RetrievalConfig
from retro_jax.retrieval.dense_build import build_dense_index, dense_index_settings
from retro_jax.retrieval.dense_index import DenseIndex, import_faiss
from retro_jax.retrieval.exact_index import EXACT, ExactIndex
from retro_jax.retrieval.faiss_gpus import num_gpus
from retro_jax.retrieval.metric import DISTANCES
from retro_jax.retrieval.sparse_index import SparseIndex, build_sparse_index
from retro_jax.retrieval.vectors import SparseVectors, Vectors, open_vectors


class Index(Protocol):
    """The vectors of the training chunks, made to be searched."""

    @property
    def num_chunks(self) -> int:
        """Chunks of the database."""
        ...

    def search(self, queries: Vectors, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``width`` nearest chunks of each query, in no order that counts.

        Returns:
            ids int64 [queries, width], -1 where the index has no more, and distances float32, inf there. Chunks that have the
            same vector get the same distance.
        """
        ...

    def rounding(self, queries: Vectors, farthest_Q: np.ndarray) -> np.ndarray:
        """Two distances of a query that differ by no more, float32 [Q], may be one that was rounded differently inside the index;
        ``farthest_Q``: the largest distance found for each."""
        ...


def build_index(config: RetrievalConfig, vectors: Artefact, path: Path) -> Artefact:
    """Index the train split's vectors, or open what stands there."""
    database = open_vectors(vectors, "train")

    def make(folder: Path) -> Mapping:
        if isinstance(database, SparseVectors):
            return build_sparse_index(config, vectors, folder)
        return build_dense_index(config, database, folder)

    settings = {} if isinstance(database, SparseVectors) else dense_index_settings(config)
    return build_artefact(path, kind="index", settings=settings, inputs={"vectors": vectors.fingerprint}, make=make)


def open_index(index: Artefact, vectors: Artefact) -> Index:
    """The index, memory-mapped."""
    database = open_vectors(vectors, "train")
    if isinstance(database, SparseVectors):
        return SparseIndex.open(index)
    return ExactIndex.open(index, database) if is_exact(index) else DenseIndex.open(index, database)


def is_exact(index: Artefact) -> bool:
    """Whether JAX compares every chunk."""
    return index.summary.get("factory") == EXACT


def one_process(index: Artefact) -> bool:
    """Whether a search keeps all devices or GPUs busy by itself; several processes would be in each other's way."""
    dense = "factory" in index.summary
    return is_exact(index) or (dense and num_gpus(import_faiss()) > 0)


def distance_of(index: Artefact) -> str:
    """What the distances are, in words."""
    return DISTANCES[index.summary.get("metric", "cosine")]
