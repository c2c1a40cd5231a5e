"""What finds the nearest database chunks of vectors: the seam, and the choice between its two forms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from retro_jax.artefact import Artefact, build_artefact
from retro_jax.config import RetrievalConfig
from retro_jax.retrieval.dense_build import build_dense_index, dense_index_settings
from retro_jax.retrieval.dense_index import DenseIndex
from retro_jax.retrieval.sparse_index import SparseIndex, build_sparse_index
from retro_jax.retrieval.vectors import SparseVectors, Vectors, open_vectors

# How neighbours' distances are defined, whatever the embedder; said in the manifest.
DISTANCE = "1 - cosine"


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


def build_index(config: RetrievalConfig, vectors: Artefact, path: Path) -> Artefact:
    """Index the train split's vectors, or open what stands there."""
    database = open_vectors(vectors, "train")

    def make(folder: Path) -> Mapping:
        if isinstance(database, SparseVectors):
            return build_sparse_index(config, database, folder)
        return build_dense_index(config, database, folder)

    settings = {} if isinstance(database, SparseVectors) else dense_index_settings(config)
    return build_artefact(path, kind="index", settings=settings, inputs={"vectors": vectors.fingerprint}, make=make)


def open_index(index: Artefact, vectors: Artefact) -> Index:
    """The index, memory-mapped."""
    database = open_vectors(vectors, "train")
    return SparseIndex.open(index) if isinstance(database, SparseVectors) else DenseIndex.open(index, database)
