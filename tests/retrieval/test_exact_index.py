"""Exact search in JAX: against float64 in NumPy, over blocks, devices and metrics."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from retro_jax.config import Metric, RetrievalConfig
from retro_jax.retrieval import dense_build, exact_index
from retro_jax.retrieval.dense_build import build_dense_index
from retro_jax.retrieval.exact_index import ExactIndex, devices_in_words, rows_of_block
from retro_jax.retrieval.search import nearest_outside
from retro_jax.retrieval.vectors import DenseVectors
from tests.retrieval.test_metric import METRICS, true_distances

N, D = 1100, 24


def write_database(path: Path, metric: Metric) -> DenseVectors:
    """Vectors about some centres, with copies of one of them in every block, and one of zeros."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20, D))[rng.integers(0, 20, N)] + 0.3 * rng.standard_normal((N, D))
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[[5, 300, 301, 700, 1099]] = vectors[5]
    vectors[7] = 0
    np.save(path, vectors.astype(np.float32))
    return DenseVectors(path)


def longest(database: DenseVectors) -> float:
    return float(np.linalg.norm(database.vectors_ND, axis=1).max())


@pytest.mark.parametrize("metric", METRICS)
def test_equals_brute_force(metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In nine blocks over the tests' eight devices; of copies of a vector the lowest ids are found."""
    monkeypatch.setattr(exact_index, "DEVICE_BYTES", 0)
    monkeypatch.setattr(exact_index, "LEAST_ROWS", 16)
    monkeypatch.setattr(exact_index, "QUERIES_AT_ONCE", 16)
    assert jax.local_device_count() == 8
    database = write_database(tmp_path / "v.npy", metric)
    index = ExactIndex(database, metric, longest(database))
    queries = np.array(database.vectors_ND[:40])
    ids, distances = index.search(queries, 10)
    true = true_distances(metric, queries, database.vectors_ND)
    expected = np.sort(true, axis=1)[:, :10]
    asked = np.arange(40) != 7
    np.testing.assert_allclose(np.sort(distances, axis=1)[asked], expected[asked], atol=2e-5)  # measured 4e-6
    np.testing.assert_allclose(distances[asked], np.take_along_axis(true, ids, 1)[asked], atol=2e-5)
    assert (ids[7] == -1).all() and np.isinf(distances[7]).all()
    copies, _ = index.search(queries[5:6], 3)
    assert metric == "inner_product" or sorted(copies[0]) == [5, 300, 301]


@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_outside_the_own_document(metric: Metric, tmp_path: Path) -> None:
    """Ordered by (distance, id) on every scale: vectors a hundred times as long have ties a hundred or more times as wide."""
    path = tmp_path / "v.npy"
    database = write_database(path, metric)
    if metric != "cosine":
        np.save(path, np.array(database.vectors_ND) * np.float32(128))
        database = DenseVectors(path)
    documents = np.arange(N) // 4
    queries = np.array(database.vectors_ND[:60])
    ids, distances = nearest_outside(ExactIndex(database, metric, longest(database)), queries, documents[:60], documents, 5)
    true = true_distances(metric, queries, database.vectors_ND)
    true[documents[:60, None] == documents] = np.inf
    scale = np.abs(true[np.isfinite(true)]).max()
    asked = np.arange(60) != 7
    np.testing.assert_allclose(distances[asked], np.sort(true, axis=1)[asked, :5], atol=1e-6 * scale)
    if metric != "inner_product":
        assert ids[5, :4].tolist() == [300, 301, 700, 1099]
    same = distances[:, 1:] == distances[:, :-1]
    assert (ids[:, 1:] > ids[:, :-1])[same & (ids[:, 1:] >= 0)].all()


def test_the_whole_database_can_be_asked_for(tmp_path: Path) -> None:
    database = write_database(tmp_path / "v.npy", "l2")
    ids, distances = ExactIndex(database, "l2", longest(database)).search(np.array(database.vectors_ND[:3]), 5 * N)
    assert (np.sort(ids, axis=1) == np.arange(N)).all() and np.isfinite(distances).all()


@pytest.mark.parametrize(("Q", "W", "dim"), [(4096, 32, 256), (512, 64, 1024), (8, 2048, 64)])
def test_what_a_device_holds_is_bounded(Q: int, W: int, dim: int) -> None:
    """By XLA's account of the program, with a second block that is on its way."""
    rows, devices = rows_of_block(Q, W, dim), jax.local_device_count()
    assert rows > exact_index.LEAST_ROWS
    best = exact_index._Best.none(devices, Q, W)
    arrays = (best, np.zeros((Q, dim), np.float32), np.zeros((devices * rows, dim), np.float32), np.int32(0), np.int32(0))
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)
    memory = exact_index._program("l2").step.lower(*shapes).compile().memory_analysis()
    taken = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert taken + 4 * rows * dim <= exact_index.DEVICE_BYTES
    assert devices_in_words().endswith("at most 256 MiB of each")


def test_it_is_built_without_faiss_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_build, "import_faiss", None)
    folder = tmp_path / "index"
    folder.mkdir()
    config = RetrievalConfig(embedder="lsa", index_factory="exact")
    summary = build_dense_index(config, write_database(tmp_path / "v.npy", "cosine"), folder)
    assert summary["search"] == "exact" and summary["factory"] == "exact" and summary["metric"] == "cosine"
    assert not list(folder.iterdir())


SEVERAL = """
import sys
from pathlib import Path
import jax, numpy as np
from retro_jax.retrieval import exact_index
from retro_jax.retrieval.vectors import DenseVectors
assert jax.local_device_count() == 3
exact_index.LEAST_ROWS, exact_index.DEVICE_BYTES = 64, 0
index = exact_index.ExactIndex(DenseVectors(Path(sys.argv[1])), "l2", 1.0)
np.savez(sys.argv[2], *index.search(np.array(index.vectors.vectors_ND[:30]), 10))
print(exact_index.devices_in_words())
"""


def test_several_devices_find_the_same(tmp_path: Path) -> None:
    """Three devices, six blocks of 64 rows a device, the last of them not full."""
    database = write_database(tmp_path / "v.npy", "l2")
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SEVERAL, str(database.path), str(tmp_path / "found.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 x cpu, at most ")
    found = np.load(tmp_path / "found.npz")
    ids, distances = ExactIndex(database, "l2", 1.0).search(np.array(database.vectors_ND[:30]), 10)
    assert np.array_equal(np.sort(found["arr_0"], axis=1), np.sort(ids, axis=1))
    assert np.array_equal(np.sort(found["arr_1"], axis=1), np.sort(distances, axis=1))
