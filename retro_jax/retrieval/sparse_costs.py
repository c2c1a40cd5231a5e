"""What exact search of sparse vectors will take: told from a sample of chunks before anything is built."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from sparse_dot_topn import sp_matmul_topn

from retro_jax.config import RetrievalConfig
from retro_jax.errors import BadInput
from retro_jax.retrieval.index_costs import duration
from retro_jax.retrieval.memory import in_words, memory_of_machine
from retro_jax.retrieval.sparse_index import ENTRY_BYTES, RESULTS_AT_ONCE, SHARD_ENTRIES

SAMPLED_CHUNKS = 4096
CALIBRATION_CHUNKS = 1024
# Bytes for each entry of a shard while it is built: two copies, and one of its arrays as the file that is written.
BUILT_BYTES = 2 * ENTRY_BYTES + 4
# A running sum and a link for every chunk of a shard, in the product.
SUM_BYTES = 12
LONG = 86_400.0


@dataclass(frozen=True)
class SparseCosts:
    """Of the index of so many chunks: bytes on disk, bytes of memory, and seconds to search the neighbours of all chunks."""

    chunks: int
    index_bytes: int
    memory: int
    search_seconds: float

    def __str__(self) -> str:
        told = (
            f"the exact index of {self.chunks:,} chunks takes about {in_words(self.index_bytes)} on disk, "
            f"{in_words(self.memory)} of memory, and {duration(self.search_seconds)} to search all its chunks"
        )
        if self.index_bytes > memory_of_machine():
            told += "; it is larger than this machine's memory, so that every block of chunks reads it from the disk"
        if self.search_seconds > LONG:
            told += (
                "; time grows with the square of the corpus, and RetrievalConfig.embedder='lsa' or 'bert' is for one of this size"
            )
        return told


def sparse_costs(config: RetrievalConfig, sample: csr_matrix, chunks: int) -> SparseCosts:
    """From the n-gram counts [sampled chunks, features] of random chunks of the database.

    Raises:
        UserError: this machine has less memory than is needed.
    """
    entries = int(sample.nnz * (chunks / sample.shape[0]))
    shard_chunks = min(chunks, chunks * SHARD_ENTRIES // max(1, entries) + 1)
    memory = config.workers * max(min(entries, SHARD_ENTRIES) * BUILT_BYTES, shard_chunks * SUM_BYTES + RESULTS_AT_ONCE * 24)
    if memory > memory_of_machine():
        mend = "use RetrievalConfig.embedder='lsa'" if config.workers == 1 else f"lower RetrievalConfig.workers={config.workers}"
        raise BadInput(
            f"RetrievalConfig.embedder='tfidf' needs about {in_words(memory)} of memory for an index of {chunks} chunks, but "
            f"this machine has {in_words(memory_of_machine())}; {mend}"
        )
    workers = min(config.workers, len(os.sched_getaffinity(0)))
    seconds = _products(sample) * chunks**2 / (_products_a_second(sample) * workers)
    return SparseCosts(chunks, entries * ENTRY_BYTES, memory, seconds)


def _products(sample: csr_matrix) -> float:
    """How many columns two random chunks have in common, on average."""
    chunks = sample.shape[0]
    have_F = np.bincount(sample.indices).astype(np.float64)
    return float((have_F * (have_F - 1)).sum() / max(1, chunks * (chunks - 1)))


def _products_a_second(sample: csr_matrix) -> float:
    """Of one core of this machine: a few hundredths of a second of them."""
    rows = sample[:CALIBRATION_CHUNKS]
    lists = rows.T.tocsr()
    products = max(1.0, float((np.diff(lists.indptr).astype(np.float64) ** 2).sum()))
    began = time.perf_counter()
    sp_matmul_topn(rows, lists, top_n=min(32, rows.shape[0]))
    return products / (time.perf_counter() - began)
