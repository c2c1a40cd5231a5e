"""faiss indexes: choice by size, any factory string, refusals, distances, and widening."""

import shutil
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from retro_jax.config import RetrievalConfig
from retro_jax.errors import UserError
from retro_jax.retrieval import dense_build, disk_lists
from retro_jax.retrieval.dense_build import build_dense_index
from retro_jax.retrieval.dense_index import DenseIndex, read_index, set_search_parameters
from retro_jax.retrieval.index_choice import automatic_factory
from retro_jax.retrieval.search import nearest_outside
from retro_jax.retrieval.vectors import DenseVectors

CONFIG = RetrievalConfig(embedder="lsa", workers=1, index_train_chunks=600)
N, D = 700, 16


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> DenseVectors:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, D))
    vectors = (centres[rng.integers(0, 30, N)] + 0.3 * rng.normal(size=(N, D))).astype(np.float32)
    vectors[100:120] = vectors[100]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[7] = 0
    path = tmp_path_factory.mktemp("vectors") / "train.vectors.npy"
    np.save(path, vectors)
    return DenseVectors(path)


def build(config: RetrievalConfig, database: DenseVectors, folder: Path) -> tuple[dict, DenseIndex]:
    """Build in a folder that is then moved, as an artefact's is."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    summary = dict(build_dense_index(config, database, partial))
    shutil.rmtree(partial / "blocks", ignore_errors=True)
    partial.rename(folder)
    index = read_index(folder)
    set_search_parameters(index, summary["search_parameters"])
    return summary, DenseIndex(index, database)


def exact(database: DenseVectors, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    distances = 1 - queries.astype(np.float64) @ database.vectors_ND.T.astype(np.float64)
    ids = np.argsort(distances, axis=1, kind="stable")[:, :width]
    return ids, np.take_along_axis(distances, ids, 1)


ON_DISK = ["IVF16,Flat", "PCA8,IVF16,Flat", "IVF16,SQ8", "OPQ4,IVF8_HNSW8,PQ4x4"]
SLOW_TO_TRAIN = pytest.param("IVF16,PQ8,RFlat", marks=pytest.mark.slow)
IN_MEMORY = ["Flat", "HNSW16", "SQ8", "IVF16,PQ8x4fs", "IVF16,RaBitQ", "HNSW16_SQ8", SLOW_TO_TRAIN]


@pytest.mark.parametrize("factory", [*ON_DISK, *IN_MEMORY])
def test_any_factory_string(factory: str, database: DenseVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found again after the folder was moved, with true distances, the same from build to build, and with stated recall."""
    for module in (dense_build, disk_lists):
        monkeypatch.setattr(module, "ADD_AT_ONCE", 150)
    config = replace(CONFIG, index_factory=factory)
    summary, index = build(config, database, tmp_path / "a")
    build(config, database, tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == (["index.faiss", "lists.ivfdata"] if factory in ON_DISK else ["index.faiss"])
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    queries = np.array(database.vectors_ND[200:260])
    ids, distances = index.search(queries, 20)
    true = 1 - np.einsum("qd,qwd->qw", queries.astype(np.float64), database.vectors_ND[ids].astype(np.float64))
    np.testing.assert_allclose(distances, true, atol=1e-6)  # measured 1.2e-7
    last = exact(database, queries, 20)[1][:, -1:]
    recall = (distances <= last + 1e-6).mean()
    floor = {"Flat": 1.0, "HNSW16": 0.99, "IVF16,Flat": 0.99, "IVF16,SQ8": 0.95, "SQ8": 0.95}.get(factory, 0.4)
    assert recall >= floor
    if factory == "Flat":
        assert summary["search"] == "exact"
    else:
        assert summary["search"] == "approximate" and abs(summary["recall_at_20"] - recall) < 0.15


def test_flat_equals_brute_force(database: DenseVectors, tmp_path: Path) -> None:
    _, index = build(CONFIG, database, tmp_path / "a")
    documents = np.arange(N) // 7
    ids, distances = nearest_outside(index, np.array(database.vectors_ND), documents, documents, 5)
    cosines = database.vectors_ND.astype(np.float64) @ database.vectors_ND.T.astype(np.float64)
    expected = np.where(documents[:, None] == documents, np.inf, 1 - cosines)
    expected[7] = np.inf
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :5], atol=1e-6)  # measured 1.2e-7
    assert (ids[7] == -1).all()
    # Twenty chunks with one vector: the lowest ids of those outside the own document.
    assert ids[100].tolist() == [105, 106, 107, 108, 109] and ids[119].tolist() == [100, 101, 102, 103, 104]


def test_looks_into_more_lists_until_enough_are_found(database: DenseVectors, tmp_path: Path) -> None:
    summary, index = build(replace(CONFIG, index_factory="IVF16,Flat", index_search="nprobe=1"), database, tmp_path / "a")
    assert summary["search_parameters"] == "nprobe=1"
    queries = np.array(database.vectors_ND[:40])
    few, _ = index.index.search(queries, 300)
    assert (index.index.search(queries, 300)[1] < 0).any() and few.shape == (40, 300)
    ids, distances = index.search(queries, N)
    asked = queries.any(axis=1)
    assert (np.sort(ids[asked], axis=1) == np.arange(N)).all() and np.isfinite(distances[asked]).all()
    assert (ids[~asked] == -1).all() and np.isinf(distances[~asked]).all()
    assert index.index.nprobe == 1


def test_nothing_is_printed(database: DenseVectors, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    build(replace(CONFIG, index_factory="IVF4,Flat"), database, tmp_path / "a")
    print("kept")
    assert capfd.readouterr().out == "kept\n"


def test_the_choice_by_size() -> None:
    assert automatic_factory(1000, 256)[0] == "Flat"
    assert automatic_factory(131_072, 256)[0] == "Flat"
    factory, why = automatic_factory(1_000_000, 256)
    assert factory == "IVF4096,Flat" and "1000000 chunks" in why
    factory, why = automatic_factory(100_000_000, 256)
    assert factory == "OPQ64,IVF32768_HNSW32,PQ64" and "64 bytes" in why
    assert automatic_factory(100_000_000, 100)[0] == "OPQ4,IVF32768_HNSW32,PQ4"
    for chunks in (1000, 1_000_000, 100_000_000):
        faiss.index_factory(256, automatic_factory(chunks, 256)[0], faiss.METRIC_INNER_PRODUCT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"index_factory": "nonsense"},
            "index_factory='nonsense' is no index that faiss can make of 16 dimensions .*could not parse",
        ),
        ({"index_factory": "IVF4,PQ5"}, "index_factory='IVF4,PQ5' .*multiple of the number of subquantizers"),
        ({"index_factory": "IVF4096,Flat"}, "index_factory='IVF4096,Flat' cannot be trained on 600 chunks"),
        ({"index_search": "nprobe=4"}, "index_search='nprobe=4' does not go with the index"),
        ({"index_factory": "IVF4,Flat", "index_search": "width"}, "index_search='width' does not go with the index"),
    ],
)
def test_mistakes_are_told(change: dict, message: str, database: DenseVectors, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(replace(CONFIG, **change), database, tmp_path / "a")


def test_a_killed_build_goes_on_with_the_same_bytes(
    database: DenseVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_lists, "ADD_AT_ONCE", 100)
    config = replace(CONFIG, index_factory="IVF16,Flat")
    build(config, database, tmp_path / "whole")
    inner, calls = disk_lists._assign_block, []

    def dies(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return inner(*arguments)

    partial = tmp_path / "killed"
    partial.mkdir()
    monkeypatch.setattr(disk_lists, "_assign_block", dies)
    with pytest.raises(KeyboardInterrupt):
        build_dense_index(config, database, partial)
    build_dense_index(config, database, partial)
    assert len(calls) == 4 + 4
    for name in ("index.faiss", "lists.ivfdata"):
        assert (partial / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
