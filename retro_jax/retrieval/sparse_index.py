"""Exact search of sparse vectors: their transpose as inverted lists, in shards, multiplied a block of queries at a time.

A shard is a stretch of chunks. Building takes the memory of one shard for each worker, searching the running sums of one; the
lists themselves are mapped files, which the processes of a machine share and the kernel may drop.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sparse_dot_topn import sp_matmul_topn, zip_sp_matmul_topn

from retro_jax.artefact import Artefact, open_artefact
from retro_jax.blocks import concatenate_blocks, keep_blocks_of, run_blocks
from retro_jax.config import RetrievalConfig
from retro_jax.retrieval.metric import TIE_WIDTH
from retro_jax.retrieval.vectors import SparseVectors, open_vectors

ARRAYS = ("starts", "chunks", "data")
# An entry of a sparse vector: its column or row (int32) and its value (float32).
ENTRY_BYTES = 8
SHARD_ENTRIES = 2**24
# Results of the products that are in memory at a time (an id and a value each).
RESULTS_AT_ONCE = 2**21


@dataclass(frozen=True)
class SparseIndex:
    """The database as one csr_matrix [dim, chunks of the shard] for each shard: for each column the chunks that have it."""

    shards: Sequence[csr_matrix]

    @classmethod
    def open(cls, artefact: Artefact) -> SparseIndex:
        """Memory-mapped, so that the processes of a machine share it. Mapped copy-on-write and never written: the product
        takes writable arrays only."""
        facts = artefact.summary
        # Of 0.1.0, which had no shards, there is one.
        names = [f"{shard}." for shard in range(len(facts["shards"]))] if "shards" in facts else [""]
        shards = []
        for prefix, chunks in zip(names, facts.get("shards", [facts["chunks"]]), strict=True):
            starts, ids, data = (np.load(artefact.path / f"{prefix}{name}.npy", mmap_mode="c") for name in ARRAYS)
            shards.append(csr_matrix((data, ids, starts), shape=(facts["dim"], chunks)))
        return cls(shards)

    @property
    def num_chunks(self) -> int:
        """Chunks of the database."""
        return sum(shard.shape[1] for shard in self.shards)

    def search(self, queries: csr_matrix, width: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`retro_jax.retrieval.index.Index`. A chunk without a common column is no neighbour at any width."""
        width = min(width, self.num_chunks)
        ids_QW = np.full((queries.shape[0], width), -1, np.int64)
        distances_QW = np.full((queries.shape[0], width), np.inf, np.float32)
        rows_at_once = max(1, RESULTS_AT_ONCE // (width * len(self.shards)))
        for start in range(0, queries.shape[0], rows_at_once):
            asked = queries[start : start + rows_at_once]
            best = zip_sp_matmul_topn(width, [sp_matmul_topn(asked, shard, top_n=width) for shard in self.shards])
            found_Q = np.diff(best.indptr)
            rows = np.repeat(np.arange(start, start + len(found_Q)), found_Q)
            places = np.arange(best.indptr[-1]) - np.repeat(best.indptr[:-1], found_Q)
            ids_QW[rows, places] = best.indices[: len(rows)]
            distances_QW[rows, places] = 1 - best.data[: len(rows)]
        return ids_QW, distances_QW

    def rounding(self, queries: csr_matrix, farthest_Q: np.ndarray) -> np.ndarray:
        """See :class:`retro_jax.retrieval.index.Index`."""
        return np.full(len(farthest_Q), TIE_WIDTH, np.float32)


def build_sparse_index(config: RetrievalConfig, vectors: Artefact, folder: Path) -> Mapping:
    """Transpose the train split's vectors a shard at a time: ``<i>.starts.npy`` int32 [dim + 1], ``<i>.chunks.npy`` int32 and
    ``<i>.data.npy`` float32."""
    database = open_vectors(vectors, "train")
    assert isinstance(database, SparseVectors)
    stretches = shards_of(database.row_ends_N)
    keep_blocks_of(folder, SHARD_ENTRIES)
    run_blocks(
        folder,
        build_shard,
        ((vectors.path, start, stop) for start, stop in stretches),
        workers=min(config.workers, len(stretches)),
        description="index",
        total=len(stretches),
        executor=config.executor,
        describe=lambda task: f"train chunks {task[1]} to {task[2] - 1}",
    )
    for shard in range(len(stretches)):
        for name in ARRAYS:
            concatenate_blocks(folder, 1, name, folder / f"{shard}.{name}.npy", first=shard)
    entries = len(database.data)
    facts = {"chunks": len(database), "dim": database.dim, "entries": entries, "bytes": entries * ENTRY_BYTES}
    return {**facts, "shards": [stop - start for start, stop in stretches], "search": "exact"}


def shards_of(row_ends_N: np.ndarray) -> list[tuple[int, int]]:
    """The first chunk of each shard and the one after its last; a shard has about ``SHARD_ENTRIES`` entries."""
    total = int(row_ends_N[-1]) if len(row_ends_N) else 0
    cuts = np.searchsorted(row_ends_N, np.arange(SHARD_ENTRIES, total, SHARD_ENTRIES), side="right")
    bounds = np.unique([0, *cuts.tolist(), len(row_ends_N)]).tolist()
    return list(itertools.pairwise(bounds))


def build_shard(vectors: Path, start: int, stop: int) -> dict[str, np.ndarray]:
    """The inverted lists of a stretch of training chunks, numbered from its first."""
    database = open_vectors(open_artefact(vectors, "vectors"), "train")
    assert isinstance(database, SparseVectors)
    lists = database.rows(start, stop).tocsc()
    return {"starts": lists.indptr.astype(np.int32), "chunks": lists.indices.astype(np.int32), "data": lists.data}
