"""Choosing among saved neighbours: filters against naive loops, order, missing ones, counts."""

from pathlib import Path

import numpy as np
import pytest

from retro_jax.artefact import build_artefact
from retro_jax.retrieval import neighbour_table
from retro_jax.retrieval.neighbour_table import NeighbourFilter, NeighbourTable
from tests.retrieval.memory_table import MemoryTable
from tests.retrieval.test_overlap import naive_run

C, SAVED = 8, 6


def make_tables(seed: int) -> tuple[MemoryTable, MemoryTable]:
    """Documents over few tokens that copy stretches of each other, so that overlaps of all lengths occur."""
    rng = np.random.default_rng(seed)
    documents: list[list[int]] = []
    for _ in range(24):
        text = rng.integers(0, 8, rng.integers(3, 60)).tolist()
        if documents:
            other = documents[rng.integers(len(documents))]
            at = rng.integers(len(other))
            text[5:5] = other[at : at + rng.integers(2, 30)]
        documents.append(text)
    return MemoryTable(documents[:8], C), MemoryTable(documents[8:], C)


def make_table(folder: Path, seed: int = 0) -> NeighbourTable:
    queries, database = make_tables(seed)
    rng = np.random.default_rng(seed + 1)
    ids = np.stack([rng.permutation(database.num_chunks)[:SAVED] for _ in range(queries.num_chunks)])
    ids[3, 1:] = -1
    ids[4] = -1
    distances = np.where(ids < 0, np.inf, np.sort(rng.random(ids.shape), axis=1)).astype(np.float32)

    def make(path: Path) -> dict:
        np.save(path / "test.ids.npy", ids)
        np.save(path / "test.distances.npy", distances)
        return {}

    build_artefact(folder / "neighbours", kind="neighbours", settings={}, inputs={}, make=make)
    return NeighbourTable(folder / "neighbours", "test", queries, database, 2 * C)


def naive_select(table: NeighbourTable, chunk: int, k: int, max_overlap: float, retrieved_len: int) -> list[int]:
    queries, database = make_tables(0)
    (text,), (length,) = queries.gather(np.array([chunk]), 2 * C)
    chosen = []
    for neighbour in table.ids_NS[chunk]:
        if neighbour >= 0:
            (found,), (found_length,) = database.gather(np.array([neighbour]), retrieved_len)
            parts = [text[: min(C, length)].tolist(), text[C:length].tolist()]
            if max(naive_run(part, found[:found_length].tolist()) for part in parts) <= max_overlap * C:
                chosen.append(int(neighbour))
    return (chosen + [-1] * k)[:k]


def test_without_filters_the_first_k(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    asked = np.array([[0, 3, -1], [4, 5, 2]])
    got = table.select(asked, 2)
    assert got.shape == (2, 3, 2) and got.dtype == np.int64
    expected = np.where(asked[..., None] < 0, -1, table.ids_NS[asked][..., :2])
    np.testing.assert_array_equal(got, expected)
    assert table.select(asked, 0).shape == (2, 3, 0)
    assert table.select(np.zeros((0, 4), int), 2).shape == (0, 4, 2)


@pytest.mark.parametrize("max_overlap", [0.125, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("retrieved_len", [8, 16])
def test_near_duplicates_are_dropped(max_overlap: float, k: int, retrieved_len: int, tmp_path: Path) -> None:
    table = make_table(tmp_path)
    chunks = np.arange(len(table))
    expected = [naive_select(table, chunk, k, max_overlap, retrieved_len) for chunk in chunks]
    assert (
        table.select(chunks, k, keep=NeighbourFilter(max_overlap=max_overlap), retrieved_len=retrieved_len).tolist() == expected
    )
    if retrieved_len == 2 * C:
        assert table.select(chunks, k, keep=NeighbourFilter(max_overlap=max_overlap)).tolist() == expected
    if max_overlap < 0.5 and k < 6:
        assert expected != table.select(chunks, k).tolist()


def test_a_run_of_exactly_the_fraction_stays(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    chunks, ids = np.repeat(np.arange(len(table)), SAVED), table.ids_NS.reshape(-1)
    runs = table.overlaps(chunks, ids)
    assert len(set(runs.tolist())) > 4
    for run in range(1, C + 1):
        left = table.select(np.arange(len(table)), SAVED, keep=NeighbourFilter(max_overlap=run / C))
        assert (left >= 0).sum() == ((runs <= run) & (ids >= 0)).sum()


def test_the_chunk_after_counts_and_runs_across_do_not(tmp_path: Path) -> None:
    """Chunk 0 is 0..7 and the chunk after it 8..15."""
    queries = MemoryTable([list(range(24))], C)
    database = MemoryTable([[9, 10, 11, 12, 13], list(range(4, 12)), [16, 17, 18, 19]], C)
    ids = np.array([[0, 1, 2]] * 3)

    def make(path: Path) -> dict:
        np.save(path / "test.ids.npy", ids)
        np.save(path / "test.distances.npy", np.zeros(ids.shape, np.float32))
        return {}

    build_artefact(tmp_path / "n", kind="neighbours", settings={}, inputs={}, make=make)
    table = NeighbourTable(tmp_path / "n", "test", queries, database, C)
    assert table.overlaps(np.array([0, 0, 0, 1, 2]), np.array([0, 1, 2, 2, 2])).tolist() == [5, 4, 0, 4, 4]
    assert table.overlaps(np.array([0, -1]), np.array([-1, 2])).tolist() == [0, 0]


def test_counts_of_chunks_left_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(tmp_path)
    monkeypatch.setattr(neighbour_table, "ROWS_AT_ONCE", 7)
    for k in range(SAVED + 1):
        assert table.count_short(k) == int((table.ids_NS[:, :k] < 0).any(axis=1).sum())
        left = table.select(np.arange(len(table)), k, keep=NeighbourFilter(max_overlap=0.3))
        assert table.count_short(k, keep=NeighbourFilter(max_overlap=0.3)) == int((left < 0).any(axis=1).sum())
    assert table.count_short(2) == 2


def test_more_than_were_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k=7 is not in 0 to 6"):
        make_table(tmp_path).select(np.array([0]), 7)
