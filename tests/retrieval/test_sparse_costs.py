"""What exact search of sparse vectors is told to take, against what it takes."""

import os
from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random_array

from retro_jax.config import RetrievalConfig
from retro_jax.errors import UserError
from retro_jax.retrieval import sparse_costs
from retro_jax.retrieval.sparse_costs import SparseCosts

CONFIG = RetrievalConfig(workers=1)
GIB = 2**30


def database(chunks: int, seed: int = 0) -> csr_matrix:
    """Twenty columns a chunk, some much more frequent than others."""
    rng = np.random.default_rng(seed)
    columns = np.minimum(rng.zipf(1.3, (chunks, 20)) - 1, 4999)
    rows = np.repeat(np.arange(chunks), 20)
    counts = csr_matrix((np.ones(rows.size, np.float32), (rows, columns.reshape(-1))), shape=(chunks, 5000))
    counts.sum_duplicates()
    return counts


def test_a_sample_tells_entries_and_products_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = database(20_000)
    sample = whole[np.sort(np.random.default_rng(1).choice(20_000, 2000, replace=False))]
    have_F = np.diff(whole.tocsc().indptr).astype(float)
    monkeypatch.setattr(sparse_costs, "_products_a_second", lambda sample: 1e6)
    told = sparse_costs.sparse_costs(CONFIG, sample, 20_000)
    assert told.index_bytes == pytest.approx(8 * whole.nnz, rel=0.02)
    assert told.search_seconds == pytest.approx((have_F**2).sum() / 1e6, rel=0.05)


def test_a_machine_with_two_cores_searches_in_half_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_costs, "_products_a_second", lambda sample: 1e6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    one, two, many = (
        sparse_costs.sparse_costs(replace(CONFIG, workers=workers), database(500), 10_000) for workers in (1, 2, 64)
    )
    assert one.search_seconds == 2 * two.search_seconds == 2 * many.search_seconds
    assert many.memory == 64 * one.memory


def test_chunks_without_words_cost_nothing() -> None:
    told = sparse_costs.sparse_costs(CONFIG, csr_matrix((7, 100), dtype=np.float32), 1000)
    assert told.index_bytes == 0 and told.search_seconds == 0


def test_memory_does_not_grow_beyond_a_shard() -> None:
    sample = csr_matrix(random_array((50, 1000), density=0.1, format="csr", dtype=np.float32, random_state=0))
    sizes = [sparse_costs.sparse_costs(CONFIG, sample, chunks).memory for chunks in (10_000_000, 1_000_000_000)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3) and sizes[0] < GIB


def test_too_little_memory_names_what_lowers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_costs, "memory_of_machine", lambda: 2 * GIB)
    with pytest.raises(UserError, match=r"but this machine has 2\.0 GiB; lower RetrievalConfig.workers=64"):
        sparse_costs.sparse_costs(replace(CONFIG, workers=64), database(500), 10_000)


def test_a_corpus_that_is_too_large_for_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_costs, "memory_of_machine", lambda: 16 * GIB)
    small, large = SparseCosts(1000, GIB, GIB, 60.0), SparseCosts(10**8, 40 * GIB, GIB, 9e6)
    assert (
        str(small)
        == "the exact index of 1,000 chunks takes about 1.0 GiB on disk, 1.0 GiB of memory, and 60 s to search all its chunks"
    )
    assert (
        "104 days to search" in str(large)
        and "embedder='lsa'" in str(large)
        and "larger than this machine's memory" in str(large)
    )
