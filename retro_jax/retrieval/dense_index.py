"""Dense vectors searched by faiss: any factory string, distances computed anew from the vectors themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from retro_jax.artefact import Artefact
from retro_jax.config import RetrievalConfig
from retro_jax.errors import BadInput, UserError
from retro_jax.progress import progress_bar
from retro_jax.retrieval.vectors import DenseVectors

INDEX_FILE = "index.faiss"
# Up to here the exact scan is as fast as training an index and searching it; above the second the vectors themselves are
# too many to keep in the index.
EXACT_UP_TO = 131_072
VECTORS_UP_TO = 4_194_304
ADD_AT_ONCE = 65_536
GATHERED_AT_ONCE = 2**16
RECALL_QUERIES, RECALL_AT = 256, 10


@dataclass(frozen=True)
class DenseIndex:
    """A faiss index of unit vectors (inner product), and the vectors."""

    index: Any
    vectors: DenseVectors

    @classmethod
    def open(cls, artefact: Artefact, vectors: DenseVectors) -> DenseIndex:
        """Memory-mapped where faiss can."""
        faiss = import_faiss()
        index = faiss.read_index(str(artefact.path / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_ONDISK_SAME_DIR)
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
        with one_thread(import_faiss()):
            _, ids_QW = self.index.search(queries, width)
        ids_QW[~queries.any(axis=1)] = -1
        return ids_QW, _distances(queries, self.vectors, ids_QW)


def dense_index_settings(config: RetrievalConfig) -> Mapping:
    """The settings that decide the index."""
    return {
        "factory": config.index_factory,
        "search_parameters": config.index_search,
        "train_chunks": config.index_train_chunks,
        "seed": config.seed,
    }


def build_dense_index(config: RetrievalConfig, database: DenseVectors, folder: Path) -> Mapping:
    """Train the index on a random sample, add the database in blocks, measure its recall; writes ``index.faiss``."""
    faiss = import_faiss()
    chunks, dim = database.vectors_ND.shape
    factory, why = (config.index_factory, "as configured") if config.index_factory != "auto" else automatic_factory(chunks, dim)
    index = make_index(faiss, factory, dim)
    # HNSW graphs depend on the order in which threads insert, so they are built by one.
    with one_thread(faiss, "HNSW" in factory):
        _train(faiss, index, factory, database, min(config.index_train_chunks, chunks), config.seed)
        with progress_bar("index", chunks) as bar:
            for start in range(0, chunks, ADD_AT_ONCE):
                block_ND = database.rows(start, min(start + ADD_AT_ONCE, chunks))
                index.add(block_ND)
                bar.advance(len(block_ND))
    parameters = automatic_parameters(faiss, index) if config.index_search == "auto" else config.index_search
    set_search_parameters(index, parameters)
    faiss.write_index(index, str(folder / INDEX_FILE))
    exact = factory.endswith("Flat") and "IVF" not in factory and "HNSW" not in factory and "," not in factory
    facts = {"chunks": chunks, "dim": dim, "factory": factory, "why": why, "search_parameters": parameters}
    if exact:
        return {**facts, "search": "exact"}
    return {**facts, "search": "approximate", f"recall_at_{RECALL_AT}": _recall(DenseIndex(index, database), config.seed)}


def automatic_factory(chunks: int, dim: int) -> tuple[str, str]:
    """A faiss factory string for so many vectors, and why."""
    if chunks <= EXACT_UP_TO:
        return "Flat", f"{chunks} chunks, not above {EXACT_UP_TO}: an exact scan is fast enough"
    lists = 2 ** round(math.log2(4 * math.sqrt(chunks)))
    if chunks <= VECTORS_UP_TO:
        return (
            f"IVF{lists},Flat",
            f"{chunks} chunks, not above {VECTORS_UP_TO}: about 4 sqrt(chunks) inverted lists of whole vectors",
        )
    code = next(size for size in (64, 32, 16, 8, 4, 2, 1) if dim % size == 0)
    return (
        f"OPQ{code},IVF{lists}_HNSW32,PQ{code}",
        f"{chunks} chunks, above {VECTORS_UP_TO}: inverted lists found through an HNSW graph, vectors coded in {code} bytes",
    )


def automatic_parameters(faiss: ModuleType, index: Any) -> str:
    """Search parameters in faiss's notation: a sixteenth of the inverted lists, 16 at least and 128 at most."""
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        return f"nprobe={min(inverted.nlist, max(16, min(128, inverted.nlist // 16)))}"
    return "efSearch=128" if isinstance(faiss.downcast_index(index), faiss.IndexHNSW) else ""


def make_index(faiss: ModuleType, factory: str, dim: int) -> Any:
    """An empty index for inner products.

    Raises:
        UserError: faiss does not understand the factory string, or it does not go with ``dim``.
    """
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise BadInput(
            f"RetrievalConfig.index_factory={factory!r} is no index that faiss can make of {dim} dimensions ({_reason(error)}); "
            "use 'auto', or a factory string such as 'Flat', 'IVF1024,Flat' or 'HNSW32'"
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
            f"RetrievalConfig.index_search={parameters!r} does not go with the index ({_reason(error)}); use 'auto', or for "
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


def _train(faiss: ModuleType, index: Any, factory: str, database: DenseVectors, sample: int, seed: int) -> None:
    if index.is_trained:
        return
    ids = np.sort(np.random.default_rng(seed).choice(len(database), sample, replace=False, shuffle=False))
    try:
        index.train(np.array(database.vectors_ND[ids]))
    except RuntimeError as error:
        raise BadInput(
            f"RetrievalConfig.index_factory={factory!r} cannot be trained on {sample} chunks ({_reason(error)}); "
            "use 'auto' or a smaller index"
        ) from None


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


def _recall(index: DenseIndex, seed: int) -> float:
    """Share of the exact nearest chunks of some random database chunks that the index finds too."""
    chunks = index.num_chunks
    ids = np.sort(np.random.default_rng(seed).choice(chunks, min(RECALL_QUERIES, chunks), replace=False, shuffle=False))
    queries_QD, at = np.array(index.vectors.vectors_ND[ids]), min(RECALL_AT, chunks)
    exact = import_faiss().ResultHeap(len(ids), at, keep_max=True)
    for start in range(0, chunks, ADD_AT_ONCE):
        block_ND = index.vectors.rows(start, min(start + ADD_AT_ONCE, chunks))
        cosines_QW, place_QW = import_faiss().knn(
            queries_QD, block_ND, min(at, len(block_ND)), import_faiss().METRIC_INNER_PRODUCT
        )
        exact.add_result(cosines_QW, place_QW + start)
    exact.finalize()
    found, _ = index.search(queries_QD, at)
    return float(np.mean([len(np.intersect1d(a, b)) / at for a, b in zip(exact.I, found, strict=True)]))


def _reason(error: RuntimeError) -> str:
    """faiss's message without the place in its source where it was raised."""
    text = str(error).split("Error: ")[-1] if "Error: " in str(error) else str(error).split(": ", 1)[-1]
    return text.strip()
