"""What an index will take, in memory and time: told before anything is built."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from retro_jax.config import RetrievalConfig
from retro_jax.errors import UserError
from retro_jax.retrieval.dense_index import import_faiss, make_index, one_thread
from retro_jax.retrieval.disk_lists import ADD_AT_ONCE, ID_BYTES, goes_to_disk, rows_of_part
from retro_jax.retrieval.exact_index import DEVICE_BYTES, EXACT
from retro_jax.retrieval.index_choice import chosen_factory
from retro_jax.retrieval.index_recall import RECALL_QUERIES
from retro_jax.retrieval.memory import in_words, memory_of_machine

# Times are told in distances of a matrix product; how many of them this machine computes a second is measured when it is needed.
# Measured with faiss 1.15.1 on one core of a Xeon of 2023 (AVX-512; 256 dimensions, 6.0e7 distances a second).
CALIBRATION_QUERIES, CALIBRATION_CHUNKS = 256, 8192
KMEANS_ROUNDS, KMEANS_POINTS = 10, 256
SCANNED_VECTOR = 2.7  # a vector in an inverted list
SCANNED_CODE = 8.0  # a code of 64 bytes there
GRAPH_INSERT, GRAPH_SEARCH = 6600, 2600  # a vector put into an HNSW graph of 32 links, its list found through one
CODED_VECTOR = 500  # a vector turned and coded in 64 bytes
TRAINED_CODES = 1.7e10  # a rotation and a product quantizer trained
GRAPH_PLACE_BYTES = 12  # a vector's level in a graph, and where its links begin
COPIED_BYTES = 1e9  # bytes a second to read vectors and to write them


@dataclass(frozen=True)
class IndexCosts:
    """A factory string, why it was chosen, and what it takes: bytes of the index, bytes of memory while it is built (on one
    device, for the exact one), and seconds to build it and to search the neighbours of all its chunks."""

    factory: str
    why: str
    index_bytes: float
    memory: float
    build_seconds: float
    search_seconds: float

    def __str__(self) -> str:
        where = f"{in_words(round(self.memory))} of memory while it is built"
        if self.factory == EXACT:
            where = f"at most {in_words(round(self.memory))} of each device"
        return (
            f"{self.factory} ({self.why}): about {in_words(round(self.index_bytes))} on disk, {where}, "
            f"{duration(self.build_seconds)} to build and {duration(self.search_seconds)} to search all its chunks on CPUs"
        )


def costs_of(config: RetrievalConfig, chunks: int, dim: int) -> IndexCosts:
    """The index that ``config`` asks for, and what it will take on this machine, roughly.

    Raises:
        UserError: faiss is missing, does not understand the factory string, or the index needs more memory than there is.
    """
    factory, why = chosen_factory(config.index_factory, chunks, dim)
    cores, copied = len(os.sched_getaffinity(0)), chunks * dim * 4 / COPIED_BYTES
    workers = min(config.workers, cores)
    if factory == EXACT:
        return IndexCosts(EXACT, why, 0, DEVICE_BYTES, copied, chunks**2 / (_distances_a_second(dim) * cores))
    faiss = import_faiss()
    index = make_index(faiss, factory, dim, config.metric)
    rate, chunk_bytes, lists = _distances_a_second(dim), bytes_per_chunk(faiss, index), _lists(faiss, index)
    graph, coded = "HNSW" in factory, chunk_bytes < dim
    sample = 0 if index.is_trained else min(config.index_train_chunks, chunks)
    assigned = GRAPH_SEARCH if graph else lists
    trained = KMEANS_ROUNDS * min(sample, KMEANS_POINTS * lists) * lists / (1 if graph else cores)
    trained += TRAINED_CODES if coded and sample else 0
    if lists:
        added = chunks * (assigned + CODED_VECTOR * coded) / workers
        probed = max(16, min(128, lists // 16)) / lists
        searched = chunks * (assigned + probed * chunks * (SCANNED_CODE if coded else SCANNED_VECTOR))
    else:
        added = chunks * (GRAPH_INSERT if graph else CODED_VECTOR * coded)
        searched = chunks * (8 * GRAPH_SEARCH if graph else chunks)  # efSearch=128 is 8 times 16
    recall = 0 if factory == "Flat" else 2 * RECALL_QUERIES * chunks / cores
    size = chunks * chunk_bytes + lists * dim * 4
    memory = max(2 * sample * dim * 4, _memory_to_add(faiss, index, config, chunks, dim, chunk_bytes))
    costs = IndexCosts(factory, why, size, memory, copied + (trained + added + recall) / rate, searched / (rate * workers))
    if memory > memory_of_machine():
        raise UserError(
            f"RetrievalConfig.index_factory={config.index_factory!r}: {factory} of {chunks} chunks takes "
            f"{in_words(round(memory))} of memory while it is built, but this machine has {in_words(memory_of_machine())}; "
            "use 'auto', or an index with inverted lists or shorter codes"
        )
    return costs


def bytes_per_chunk(faiss: ModuleType, index: Any) -> float:
    """What one vector takes in an index of this kind: its code, its id in an inverted list, its links in a graph."""
    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexHNSW):
        links = inner.hnsw.nb_neighbors(0) + inner.hnsw.nb_neighbors(1) / (inner.hnsw.nb_neighbors(1) - 1)
        return faiss.downcast_index(inner.storage).sa_code_size() + 4 * links + GRAPH_PLACE_BYTES
    inverted = faiss.try_extract_index_ivf(inner)
    if inverted is None:
        return inner.sa_code_size()
    return inner.sa_code_size() - inverted.coarse_code_size() + ID_BYTES  # the list is told by the place, not by the code


def _memory_to_add(faiss: ModuleType, index: Any, config: RetrievalConfig, chunks: int, dim: int, chunk_bytes: float) -> float:
    """Lists that go to disk are in memory a part at a time, three times over; anything else is there whole."""
    block = min(chunks, ADD_AT_ONCE) * dim * 4
    if not goes_to_disk(faiss, index):
        return chunks * chunk_bytes + block
    part = min(chunks, rows_of_part(faiss, index)) * chunk_bytes + _lists(faiss, index) * dim * 4
    return config.workers * (3 * part + 2 * block)


def _lists(faiss: ModuleType, index: Any) -> int:
    inverted = faiss.try_extract_index_ivf(index)
    return 0 if inverted is None else inverted.nlist


def _distances_a_second(dim: int) -> float:
    """Of one core of this machine, with all others at rest: a few hundredths of a second of products."""
    faiss = import_faiss()
    rng = np.random.default_rng(0)
    queries, chunks = (rng.random((count, dim), np.float32) for count in (CALIBRATION_QUERIES, CALIBRATION_CHUNKS))
    took = []
    with one_thread(faiss):
        for _ in range(3):
            began = time.perf_counter()
            faiss.knn(queries, chunks, 1, faiss.METRIC_INNER_PRODUCT)
            took.append(time.perf_counter() - began)
    return CALIBRATION_QUERIES * CALIBRATION_CHUNKS / min(took)


def duration(seconds: float) -> str:
    """In the unit that a person would use."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{max(1, round(seconds))} s"
