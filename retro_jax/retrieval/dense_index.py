"""Search of dense vectors by faiss, with distances computed anew from the vectors themselves."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from retro_jax.artefact import Artefact
from retro_jax.errors import BadInput, UserError
from retro_jax.retrieval.vectors import DenseVectors

INDEX_FILE, LISTS_FILE = "index.faiss", "lists.ivfdata"
GATHERED_AT_ONCE = 2**16
# An inverted-list index that runs short for a query looks into this many times the lists.
WIDEN_LISTS = 4


@dataclass(frozen=True)
class DenseIndex:
    """A faiss index of unit vectors (inner product), and the vectors."""

    index: Any
    vectors: DenseVectors

    @classmethod
    def open(cls, artefact: Artefact, vectors: DenseVectors) -> DenseIndex:
        """The index of a finished artefact."""
        index = read_index(artefact.path)
        set_search_parameters(index, artefact.summary["search_parameters"])
        return cls(index, vectors)

    @property
    def num_chunks(self) -> int:
        """Chunks of the database."""
        return self.index.ntotal

    def search(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`retro_jax.retrieval.index.Index`. A query of zeros (a text in which the embedder found nothing) has no
        neighbours."""
        width = min(width, self.num_chunks)
        faiss = import_faiss()
        with one_thread(faiss):
            _, ids_QW = self.index.search(queries, width)
            inverted = faiss.try_extract_index_ivf(self.index)
            if inverted is not None:
                self._search_more_lists(inverted, queries, ids_QW)
        ids_QW[~queries.any(axis=1)] = -1
        return ids_QW, _distances(queries, self.vectors, ids_QW)

    def _search_more_lists(self, inverted: Any, queries: np.ndarray, ids_QW: np.ndarray) -> None:
        """The lists that are nearest to a query may hold fewer chunks than are wanted."""
        configured = inverted.nprobe
        while inverted.nprobe < inverted.nlist and len(short := np.flatnonzero((ids_QW < 0).any(axis=1))):
            inverted.nprobe = min(inverted.nlist, WIDEN_LISTS * inverted.nprobe)
            _, ids_QW[short] = self.index.search(queries[short], ids_QW.shape[1])
        inverted.nprobe = configured


def read_index(folder: Path) -> Any:
    """The index of a folder, memory-mapped; inverted lists on disk are looked for in the folder, wherever they were made."""
    faiss = import_faiss()
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY if (folder / LISTS_FILE).exists() else faiss.IO_FLAG_MMAP_IFC
    with without_stdout():
        return faiss.read_index(str(folder / INDEX_FILE), flags)


def make_index(faiss: ModuleType, factory: str, dim: int) -> Any:
    """An empty index for inner products.

    Raises:
        UserError: faiss does not understand the factory string, or it does not go with ``dim``.
    """
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise BadInput(
            f"RetrievalConfig.index_factory={factory!r} is no index that faiss can make of {dim} dimensions "
            f"({faiss_reason(error)}); use 'auto', or a factory string such as 'Flat', 'IVF1024,Flat' or 'HNSW32'"
        ) from None


def set_search_parameters(index: Any, parameters: str) -> None:
    """Set parameters in faiss's notation ("nprobe=32,efSearch=64"); "" sets none.

    Raises:
        UserError: the index has no such parameter.
    """
    try:
        if parameters:
            import_faiss().ParameterSpace().set_index_parameters(index, parameters)
    except RuntimeError as error:
        raise BadInput(
            f"RetrievalConfig.index_search={parameters!r} does not go with the index ({faiss_reason(error)}); use 'auto', or for "
            "example 'nprobe=64' with an IVF index and 'efSearch=128' with HNSW"
        ) from None


def import_faiss() -> ModuleType:
    """faiss, imported only where a dense index is used: faiss-cpu and faiss-gpu are the same module, and users choose.

    Raises:
        UserError: neither is installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("dense vectors are searched by faiss; install retro-jax[cpu] or retro-jax[gpu], or use 'tfidf'") from None
    return faiss


@contextmanager
def one_thread(faiss: ModuleType, wanted: bool = True) -> Iterator[None]:
    """One thread inside: processes share the work, and results do not depend on how many cores there are."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def without_stdout() -> Iterator[None]:
    """Nothing reaches standard output inside: faiss prints there where it works on lists on disk."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


def _distances(queries_QD: np.ndarray, vectors: DenseVectors, ids_QW: np.ndarray) -> np.ndarray:
    """1 - cosine from the vectors themselves, in one fixed order of sums: what faiss tells depends on the block's shape by a
    rounding, and on the codes of a compressed index."""
    distances_QW = np.full(ids_QW.shape, np.inf, np.float32)
    rows_at_once = max(1, GATHERED_AT_ONCE // max(1, ids_QW.shape[1]))
    for start in range(0, len(ids_QW), rows_at_once):
        rows = slice(start, start + rows_at_once)
        found = ids_QW[rows] >= 0
        query, place = np.nonzero(found)
        cosines = np.einsum("nd,nd->n", queries_QD[rows][query], vectors.vectors_ND[ids_QW[rows][found]])
        distances_QW[start + query, place] = 1 - cosines
    return distances_QW


def faiss_reason(error: RuntimeError) -> str:
    """faiss's message without the place in its source where it was raised."""
    text = str(error).split("Error: ")[-1] if "Error: " in str(error) else str(error).split(": ", 1)[-1]
    return text.strip()
