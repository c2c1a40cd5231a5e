"""The exact look-up against a naive scan of the training documents."""

from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from retro_jax.artefact import build_artefact
from retro_jax.errors import UserError
from retro_jax.retrieval import ngrams
from retro_jax.retrieval.ngrams import RUN, NgramLookup, build_ngrams
from tests.retrieval.memory_table import MemoryTable


def build(folder: Path, table: MemoryTable, name: str = "a") -> NgramLookup:
    build_artefact(folder / "chunks", kind="chunks", settings={"name": name}, inputs={}, make=lambda folder: {})
    return build_ngrams(folder, table)


def naive_longest_run(documents: list[list[int]], query: list[int]) -> int:
    """By growing a window from every position of the query."""
    best = 0
    for start in range(len(query)):
        for stop in range(start + RUN, len(query) + 1):
            window = query[start:stop]
            if any(document[i : i + len(window)] == window for document in documents for i in range(len(document))):
                best = max(best, len(window))
            else:
                break
    return best


@pytest.mark.parametrize("shard_tokens", [12, 1000])
@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=4),
    queries=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=5),
    taken=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50), st.integers(0, 12)), max_size=4),
)
def test_equals_a_naive_scan(shard_tokens: int, documents: list, queries: list, taken: list) -> None:
    C = 12
    queries = queries + [documents[d % len(documents)][at : at + n] for d, at, n in taken]
    tokens, lengths = np.full((len(queries), C), 1, np.int32), np.array([len(query) for query in queries])
    for row, query in enumerate(queries):
        tokens[row, : len(query)] = query
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "SHARD_TOKENS", shard_tokens)
        lookup = build(Path(folder), MemoryTable(documents, C))
        assert lookup.longest_run(tokens, lengths).tolist() == [naive_longest_run(documents, query) for query in queries]


def test_long_repeats_and_large_vocabularies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties that last through every key of the sort, ids above 2**16, and runs across chunks and shards."""
    monkeypatch.setattr(ngrams, "SHARD_TOKENS", 64)
    rng = np.random.default_rng(0)
    text = rng.integers(0, 200_000, 500).tolist()
    documents = [[7] * 300, text, [7] * 30 + [9], text[100:130] + [1] * 40]
    lookup = build(tmp_path, MemoryTable(documents, 16))
    rows = [[7] * 16, [7] * 15 + [9], text[120:130] + [1] * 6, text[120:136], [5, *text[60:75]], text[:4] + [6] * 12, [9] * 16]
    expected = [16, 16, 16, 16, 15, 0, 0]
    assert lookup.longest_run(np.array(rows), np.full(len(rows), 16)).tolist() == expected
    assert lookup.longest_run(np.array(rows), np.full(len(rows), 9)).tolist() == [9, 9, 9, 9, 8, 0, 0]
    assert lookup.longest_run(np.array(rows), np.full(len(rows), 7)).tolist() == [0] * 7


def test_many_rows_and_unequal_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(ngrams, "SHARD_TOKENS", 256)
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 3, rng.integers(1, 200)).tolist() for _ in range(12)]
    queries, lengths = rng.integers(0, 3, (100, 20)).astype(np.int32), rng.integers(0, 21, 100)
    lookup = build(tmp_path, MemoryTable(documents, 20))
    expected = [naive_longest_run(documents, row[:n].tolist()) for row, n in zip(queries, lengths, strict=True)]
    assert max(expected) > RUN
    assert lookup.longest_run(queries, lengths).tolist() == expected


def test_rows_wider_than_a_chunk_are_refused(tmp_path: Path) -> None:
    lookup = build(tmp_path, MemoryTable([[1] * 20], 10))
    with pytest.raises(ValueError, match="longer than 10"):
        lookup.longest_run(np.ones((1, 11), np.int32), np.array([11]))


def test_a_look_up_of_another_corpus_is_refused(tmp_path: Path) -> None:
    table = MemoryTable([[1] * 20], 10)
    build(tmp_path, table)
    (tmp_path / "chunks" / "manifest.json").unlink()
    with pytest.raises(UserError, match="chunks="):
        build(tmp_path, table, name="b")


def test_a_short_table_and_an_empty_one(tmp_path: Path) -> None:
    for name, documents in (("short", [[1, 2, 3]]), ("empty", [])):
        lookup = build(tmp_path / name, MemoryTable(documents, 10))
        assert lookup.longest_run(np.ones((2, 10), np.int32), np.array([10, 3])).tolist() == [0, 0]
