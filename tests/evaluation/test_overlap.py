"""Overlap of hand-made chunks with the training text."""

import json
from types import SimpleNamespace

import numpy as np

from retro_jax.config import ChunkConfig, Config, EvalConfig, ModelConfig, RetrievalConfig, RetroConfig
from retro_jax.evaluation.overlap import anywhere_runs, neighbour_runs, overlap_shares
from retro_jax.retrieval.ngrams import build_ngrams
from tests.data.disk import write_tables
from tests.data.memory import MemoryNeighbours

C = 16
FRESH = iter(range(1000, 30000))


def fresh(count):
    """Tokens that stand nowhere else."""
    return [next(FRESH) for _ in range(count)]


PASSAGE = fresh(40)
TRAIN = [
    PASSAGE + fresh(3),  # chunks 0, 1, 2
    fresh(6) + PASSAGE[:7] + fresh(2),  # chunk 3
    fresh(20),  # chunks 4, 5
]
TEST = [
    fresh(4) + PASSAGE[2:8] + fresh(6),  # 0: six tokens in a row, in chunk 0 and in chunk 3
    PASSAGE[10:26],  # 1: a whole chunk, across chunks 0 and 1
    fresh(4) + PASSAGE[20:32],  # 2: twelve tokens, all in chunk 1
    [*PASSAGE[:4], PASSAGE[30], *PASSAGE[5:9]],  # 3: short; its longest run is four of nine tokens
    fresh(16),  # 4
]


def tables(folder):
    return write_tables(folder, {"train": TRAIN, "test": TEST}, C)


NEIGHBOURS = [[3, 0, 4], [0, 2, -1], [4, 5, 3], [0, -1, -1], [-1, -1, -1]]


def test_runs_shared_with_neighbours_and_their_continuations(tmp_path):
    found = tables(tmp_path)
    ids = np.arange(5)
    read = {"queries": found["test"], "database": found["train"], "neighbours": MemoryNeighbours(NEIGHBOURS)}
    runs = neighbour_runs(ids, count=3, retrieved_len=2 * C, **read)
    # Chunk 3 holds PASSAGE[:7], of which test chunk 0 shares 2..6; chunk 0 shares 2..7. No neighbour of chunk 2 has its passage.
    np.testing.assert_array_equal(runs, [6, 16, 0, 4, 0])
    np.testing.assert_array_equal(neighbour_runs(ids, count=1, retrieved_len=2 * C, **read), [5, 16, 0, 4, 0])
    # Without continuations only the part in chunk 0 counts.
    np.testing.assert_array_equal(neighbour_runs(ids, count=1, retrieved_len=C, **read), [5, 6, 0, 4, 0])


def test_runs_of_eight_tokens_anywhere(tmp_path):
    found = tables(tmp_path)
    ngrams = build_ngrams(tmp_path, found["train"])
    np.testing.assert_array_equal(anywhere_runs(np.arange(5), found["test"], ngrams), [0, 16, 12, 0, 0])


def test_share_is_the_longer_of_both_by_the_chunks_own_length(tmp_path):
    found = tables(tmp_path)
    prepared = SimpleNamespace(
        tables=found,
        neighbours={"test": MemoryNeighbours(NEIGHBOURS)},
        ngrams=build_ngrams(tmp_path, found["train"]),
        fingerprints={"chunks": "a"},
    )
    chunks = ChunkConfig(chunk_len=C, retrieved_len=2 * C)
    config = Config(
        chunks=chunks,
        model=ModelConfig(retro=RetroConfig(chunks=chunks)),
        retrieval=RetrievalConfig(saved=3),
        evaluation=EvalConfig(overlap_neighbours=3),
    )
    expected = [6 / 16, 1.0, 12 / 16, 4 / 9, 0.0]
    np.testing.assert_allclose(overlap_shares(config, prepared, np.arange(5), tmp_path), expected)
    # Read again as long as the data are the same; other data are computed.
    stored = dict(np.load(tmp_path / "overlap.npz"))
    np.savez(tmp_path / "overlap.npz", key=stored["key"], share_N=stored["share_N"] / 2)
    np.testing.assert_allclose(overlap_shares(config, prepared, np.arange(5), tmp_path), np.array(expected) / 2)
    prepared.fingerprints["chunks"] = json.dumps("b")
    np.testing.assert_allclose(overlap_shares(config, prepared, np.arange(5), tmp_path), expected)
    np.testing.assert_allclose(overlap_shares(config, prepared, np.array([1, 3]), tmp_path), [0, 1.0, 0, 4 / 9, 0])
