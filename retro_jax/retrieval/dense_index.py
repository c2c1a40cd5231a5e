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
from retro_jax.config import Metric
from retro_jax.errors import BadInput, UserError
from retro_jax.retrieval.faiss_gpus import copy_to_gpus, fits_gpus
from retro_jax.retrieval.metric import distances_between, rounding
from retro_jax.retrieval.vectors import DenseVectors

INDEX_FILE, LISTS_FILE = "index.faiss", "lists.ivfdata"
# An inverted-list index that runs short for a query looks into this many times the lists.
WIDEN_LISTS = 4


@dataclass(frozen=True)
class DenseIndex:
    """A faiss index and the vectors that it was made of.

    Attributes:
        longest: the length of the longest vector.
        parameters: search parameters in faiss's notation; "" leaves the index as it is.
        candidates: so many times the chunks that are wanted are asked of the index, and compared by their vectors: what makes
            up for codes in place of vectors.
        on_gpus: the index once more, on the machine's GPUs.
    """

    index: Any
    vectors: DenseVectors
    metric: Metric = "cosine"
    longest: float = 1.0
    parameters: str = ""
    candidates: int = 1
    on_gpus: Any = None

    @classmethod
    def open(cls, artefact: Artefact, vectors: DenseVectors) -> DenseIndex:
        """The index of a finished artefact."""
        index, summary = read_index(artefact.path), artefact.summary
        parameters = summary["search_parameters"]
        set_search_parameters(index, parameters)
        metric, longest = summary.get("metric", "cosine"), summary.get("longest", 1.0)  # of 0.1.0: cosine
        on_gpus = copy_to_gpus(import_faiss(), index, parameters)
        return cls(index, vectors, metric, longest, parameters, summary.get("candidates", 1), on_gpus)

    @property
    def num_chunks(self) -> int:
        """Chunks of the database."""
        return self.index.ntotal

    @property
    def num_lists(self) -> int:
        """Inverted lists; 0 where the index has none."""
        inverted = import_faiss().try_extract_index_ivf(self.index)
        return 0 if inverted is None else inverted.nlist

    def search(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`retro_jax.retrieval.index.Index`. A query of zeros (a text in which the embedder found nothing) has no
        neighbours."""
        faiss = import_faiss()
        width, wide = min(width, self.num_chunks), min(width * self.candidates, self.num_chunks)
        with one_thread(faiss):
            set_search_parameters(self.index, self.parameters)
            found = self.on_gpus if self.on_gpus is not None and fits_gpus(wide) else self.index
            _, ids_QW = found.search(queries, wide)
            inverted = faiss.try_extract_index_ivf(self.index)
            if inverted is not None:
                self._search_more_lists(inverted, queries, ids_QW, width)
        ids_QW[~queries.any(axis=1)] = -1
        distances_QW = distances_between(self.metric, queries, self.vectors.vectors_ND, ids_QW)
        if wide == width:
            return ids_QW, distances_QW
        nearest_QW = np.lexsort((ids_QW, distances_QW), axis=1)[:, :width]
        return np.take_along_axis(ids_QW, nearest_QW, 1), np.take_along_axis(distances_QW, nearest_QW, 1)

    def rounding(self, queries: np.ndarray, farthest_Q: np.ndarray) -> np.ndarray:
        """See :class:`retro_jax.retrieval.index.Index`."""
        return rounding(self.metric, queries, farthest_Q, self.longest)

    def _search_more_lists(self, inverted: Any, queries: np.ndarray, ids_QW: np.ndarray, width: int) -> None:
        """The lists that are nearest to a query may hold fewer chunks than are wanted."""
        configured = inverted.nprobe
        while inverted.nprobe < inverted.nlist and len(short := np.flatnonzero((ids_QW >= 0).sum(axis=1) < width)):
            inverted.nprobe = min(inverted.nlist, WIDEN_LISTS * inverted.nprobe)
            _, ids_QW[short] = self.index.search(queries[short], ids_QW.shape[1])
        inverted.nprobe = configured


def read_index(folder: Path) -> Any:
    """The index of a folder, memory-mapped; inverted lists on disk are looked for in the folder, wherever they were made."""
    faiss = import_faiss()
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY if (folder / LISTS_FILE).exists() else faiss.IO_FLAG_MMAP_IFC
    with without_stdout():
        return faiss.read_index(str(folder / INDEX_FILE), flags)


def make_index(faiss: ModuleType, factory: str, dim: int, metric: Metric) -> Any:
    """An empty index; for vectors of unit length cosines are inner products.

    Raises:
        UserError: faiss does not understand the factory string, or it does not go with ``dim``.
    """
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise BadInput(
            f"RetrievalConfig.index_factory={factory!r} is no index that faiss can make of {dim} dimensions "
            f"({faiss_reason(error)}); use 'auto' or 'exact', or a factory string such as 'Flat', 'IVF1024,Flat' or 'HNSW32'"
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


def faiss_reason(error: RuntimeError) -> str:
    """faiss's message without the place in its source where it was raised."""
    text = str(error).split("Error: ")[-1] if "Error: " in str(error) else str(error).split(": ", 1)[-1]
    return text.strip()
