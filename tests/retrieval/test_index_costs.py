"""What an index will take, told before it is built."""

import faiss
import numpy as np
import pytest

from retro_jax.config import RetrievalConfig
from retro_jax.errors import UserError
from retro_jax.retrieval import index_costs
from retro_jax.retrieval.index_costs import bytes_per_chunk, costs_of

CONFIG = RetrievalConfig(embedder="lsa")


@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "HNSW16", "HNSW16_SQ8", "IVF4,Flat", "PCA8,IVF4,SQ8", "PQ4", "IVF4,PQ4,RFlat"]
)
def test_bytes_per_chunk_are_those_of_the_file(factory: str) -> None:
    """Twice as many chunks make a file longer by so much, within 3%: a graph's links are drawn."""
    vectors = np.random.default_rng(0).standard_normal((6000, 16), np.float32)
    index = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    told = bytes_per_chunk(faiss, index)
    index.train(vectors)
    index.add(vectors[:3000])
    before = len(faiss.serialize_index(index))
    index.add(vectors[3000:])
    grown = (len(faiss.serialize_index(index)) - before) / 3000
    assert told == pytest.approx(grown, rel=0.03)


def test_the_line_names_index_reason_memory_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_costs, "_distances_a_second", lambda dim: 1e8)
    monkeypatch.setattr(index_costs, "memory_of_machine", lambda: 2**34)
    line = str(costs_of(CONFIG, 1_000_000, 256))
    assert line.startswith(
        "IVF4096,Flat (1000000 chunks, not above 4194304: about 4 sqrt(chunks) inverted lists of whole vectors): "
    )
    assert "about 988 MiB on disk, 1.9 GiB of memory while it is built" in line  # 1e6 x (1024 + 8) bytes and the centroids
    assert "to build" in line and "to search all its chunks" in line
    assert str(costs_of(RetrievalConfig(embedder="lsa", index_factory="exact"), 10_000, 256)).startswith(
        "exact (as configured; every chunk is compared, in JAX): about 0 MiB on disk, at most 256 MiB of each device"
    )


def test_costs_grow_as_the_work_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_costs, "_distances_a_second", lambda dim: 1e8)
    monkeypatch.setattr(index_costs, "memory_of_machine", lambda: 2**44)
    flat = [costs_of(RetrievalConfig(embedder="lsa", index_factory="Flat"), chunks, 64) for chunks in (10**5, 10**6)]
    assert flat[1].search_seconds == pytest.approx(100 * flat[0].search_seconds)
    assert flat[1].memory > 5 * flat[0].memory
    codes, vectors = (costs_of(RetrievalConfig(embedder="lsa", index_factory=f), 10**8, 256) for f in ("auto", "IVF32768,Flat"))
    assert codes.index_bytes < vectors.index_bytes / 12 and "OPQ64,IVF32768_HNSW32,PQ64" in str(codes)
    assert codes.memory < 4e9  # lists are made on disk, a part at a time


def test_more_memory_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_costs, "memory_of_machine", lambda: 2**30)
    with pytest.raises(UserError, match="HNSW32 of 2000000 chunks takes 2.* GiB of memory .* has 1.0 GiB; use 'auto'"):
        costs_of(RetrievalConfig(embedder="lsa", index_factory="HNSW32"), 2_000_000, 256)
