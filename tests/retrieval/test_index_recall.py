"""Recall that an index states, and the search parameters that are raised until it is reached."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retro_jax.config import RetrievalConfig
from retro_jax.retrieval import dense_build, index_recall
from retro_jax.retrieval.dense_build import build_dense_index
from retro_jax.retrieval.dense_index import DenseIndex, read_index
from retro_jax.retrieval.exact_index import ExactIndex
from retro_jax.retrieval.index_recall import RecallSample
from retro_jax.retrieval.vectors import DenseVectors
from tests.retrieval.test_metric import METRICS, true_distances

N, D = 3000, 16
CONFIG = RetrievalConfig(embedder="lsa", workers=1, index_train_chunks=N)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> DenseVectors:
    """Directions without clusters, which inverted lists cut apart, and fifty copies of one."""
    vectors = np.random.default_rng(0).standard_normal((N, D), np.float32)
    vectors[1000:1050] = vectors[1000]
    path = tmp_path_factory.mktemp("vectors") / "train.vectors.npy"
    np.save(path, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return DenseVectors(path)


def recall_in_numpy(found: np.ndarray, asked: np.ndarray, database: DenseVectors) -> float:
    """Share of the 20 nearest other chunks, those as near as the twentieth included."""
    true = true_distances("cosine", database.vectors_ND[asked], database.vectors_ND)
    true[np.arange(len(asked)), asked] = np.inf
    last = np.sort(true, axis=1)[:, 19:20] + 1e-6
    hits = [
        min(20, np.sum((row != own) & (true[q, row] <= last[q]))) for q, (row, own) in enumerate(zip(found, asked, strict=True))
    ]
    return float(np.mean(hits)) / 20


def build(config: RetrievalConfig, database: DenseVectors, folder: Path) -> tuple[dict, DenseIndex]:
    folder.mkdir()
    summary = dict(build_dense_index(config, database, folder))
    index = DenseIndex(
        read_index(folder), database, config.metric, summary["longest"], summary["search_parameters"], summary["candidates"]
    )
    return summary, index


def test_parameters_are_raised_until_enough_is_found(database: DenseVectors, tmp_path: Path) -> None:
    few, few_index = build(replace(CONFIG, index_factory="IVF64,Flat", index_search="nprobe=4"), database, tmp_path / "few")
    enough, index = build(replace(CONFIG, index_factory="IVF64,Flat"), database, tmp_path / "enough")
    assert few["search_parameters"] == "nprobe=4" and few["recall_at_20"] < 0.8
    assert int(enough["search_parameters"].removeprefix("nprobe=")) in (32, 64) and enough["recall_at_20"] >= 0.95
    assert enough["candidates"] == 1 and read_index(tmp_path / "enough").nprobe == index.index.nprobe
    asked = np.arange(1100, 1500)
    for summary, found in ((few, few_index), (enough, index)):
        ids, _ = found.search(np.array(database.vectors_ND[asked]), 21)
        assert abs(recall_in_numpy(ids, asked, database) - summary["recall_at_20"]) < 0.04


def test_candidates_make_up_for_codes(database: DenseVectors, tmp_path: Path) -> None:
    """Four bytes in place of sixteen numbers: the nearest by codes are not the nearest, but they are among the next."""
    summary, index = build(replace(CONFIG, index_factory="PQ4"), database, tmp_path / "codes")
    assert summary["candidates"] > 1 and summary["recall_at_20"] >= 0.95
    queries = np.array(database.vectors_ND[:100])
    ids, distances = index.search(queries, 21)
    assert ids.shape == (100, 21)
    assert recall_in_numpy(ids, np.arange(100), database) > 0.9
    assert recall_in_numpy(replace(index, candidates=1).search(queries, 21)[0], np.arange(100), database) < 0.8
    np.testing.assert_allclose(
        distances, np.take_along_axis(true_distances("cosine", queries, database.vectors_ND), ids, 1), atol=1e-6
    )


def test_a_graph_looks_further(database: DenseVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_build, "automatic_parameters", lambda *_: "efSearch=16")
    few, _ = build(replace(CONFIG, index_factory="HNSW8", index_search="efSearch=16"), database, tmp_path / "few")
    enough, _ = build(replace(CONFIG, index_factory="HNSW8"), database, tmp_path / "enough")
    assert few["recall_at_20"] < 0.95 <= enough["recall_at_20"] and enough["search_parameters"] == "efSearch=32"


def test_where_nothing_helps_any_more_it_is_said(database: DenseVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph with too few links: parts of it are not reached however far is looked."""
    monkeypatch.setattr(index_recall, "MOST_EF_SEARCH", 256)
    summary, _ = build(replace(CONFIG, index_factory="HNSW4"), database, tmp_path / "graph")
    assert summary["search_parameters"] == "efSearch=256" and 0.5 < summary["recall_at_20"] < 0.95


@pytest.mark.parametrize("metric", METRICS)
def test_a_chunk_is_not_its_own_neighbour(metric: str, database: DenseVectors) -> None:
    """An index that finds nothing but the chunk itself, and its copies, has none of the others."""
    exact = ExactIndex(database, metric, 1.0)
    sample = RecallSample.of(exact, seed=0)
    assert sample.recall(exact) == 1.0 and len(sample.ids_Q) == index_recall.RECALL_QUERIES

    class OnlyItself:
        def search(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
            ids, distances = exact.search(queries, width)
            itself = ids == sample.ids_Q[:, None]
            return np.where(itself, ids, -1), np.where(itself, distances, np.inf)

    assert sample.recall(OnlyItself()) == 0.0


def test_copies_are_as_good_as_one_another(database: DenseVectors) -> None:
    """Of fifty copies an index finds others than exact search does; no one is nearer."""
    exact = ExactIndex(database, "cosine", 1.0)
    copies = RecallSample(np.arange(1000, 1050), np.array(database.vectors_ND[1000:1050]), np.zeros(50, np.float32), 20)
    copies = replace(copies, last_Q=copies._others(exact)[:, -1])

    class Last:
        def search(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
            ids, distances = exact.search(queries, 50)
            return np.sort(ids, axis=1)[:, -width:], distances[:, :width]

    assert copies.recall(Last()) == 1.0


def test_databases_of_one_chunk_or_none_but_zeros(tmp_path: Path) -> None:
    for number, vectors in enumerate((np.ones((1, 4)) / 2, np.zeros((30, 4)))):
        np.save(tmp_path / f"{number}.npy", vectors.astype(np.float32))
        exact = ExactIndex(DenseVectors(tmp_path / f"{number}.npy"), "cosine", 1.0)
        assert RecallSample.of(exact, seed=0).recall(exact) == 1.0
