"""The three metrics of dense vectors: their distances, what may be a tie, and what vectors they take."""

from pathlib import Path

import numpy as np
import pytest

from retro_jax.config import Metric, RetrievalConfig
from retro_jax.errors import UserError
from retro_jax.retrieval import metric as metric_module
from retro_jax.retrieval.metric import check_lengths, distances_between, longest_vector, rounding
from retro_jax.retrieval.vectors import DenseVectors

METRICS: tuple[Metric, ...] = ("cosine", "inner_product", "l2")


def true_distances(metric: Metric, queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    """Every distance, in float64."""
    queries, database = queries.astype(np.float64), database.astype(np.float64)
    if metric == "l2":
        return np.square(queries[:, None] - database).sum(axis=2)
    products = queries @ database.T
    return 1 - products if metric == "cosine" else -products


@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_computed_from_the_vectors(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_module, "GATHERED_AT_ONCE", 64)
    rng = np.random.default_rng(0)
    database, queries = rng.standard_normal((50, 12), np.float32), rng.standard_normal((9, 12), np.float32)
    database[3] = database[40] = queries[2]
    ids = rng.integers(-1, 50, (9, 20))
    ids[2, :2] = [3, 40]
    got = distances_between(metric, queries, database, ids)
    expected = np.where(ids < 0, np.inf, np.take_along_axis(true_distances(metric, queries, database), np.maximum(ids, 0), 1))
    np.testing.assert_allclose(got, expected, atol=1e-5)  # measured 3.6e-6
    assert got.dtype == np.float32 and got[2, 0] == got[2, 1] and (metric != "l2" or got[2, 0] == 0)


def test_what_may_be_a_tie_grows_with_the_vectors() -> None:
    """Rounding inside an index is that of float32 products, so it has their scale."""
    queries, farthest = np.full((2, 4), 50, np.float32), np.full(2, 100, np.float32)  # of length 100
    assert rounding("cosine", queries, farthest, 1.0) == pytest.approx(1e-5)
    assert rounding("inner_product", queries, farthest, 300.0) == pytest.approx(1e-5 * 100 * 300)
    assert rounding("l2", queries, farthest, 300.0) == pytest.approx(1e-5 * (100**2 + 110**2))


def test_the_cosine_takes_vectors_of_unit_length(tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)
    vectors[1] = 0
    np.save(tmp_path / "unit.npy", vectors)
    assert longest_vector("cosine", DenseVectors(tmp_path / "unit.npy")) == 1
    vectors[2] *= 3
    np.save(tmp_path / "longer.npy", vectors)
    with pytest.raises(
        UserError, match="'cosine' takes vectors of unit length, but .* one of length 3; use metric='inner_product'"
    ):
        longest_vector("cosine", DenseVectors(tmp_path / "longer.npy"))
    assert longest_vector("l2", DenseVectors(tmp_path / "longer.npy")) == 3
    vectors[0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        check_lengths("l2", vectors)


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="metric='l2' is for dense vectors; embedder='tfidf' is searched by cosine"):
        RetrievalConfig(metric="l2")
    with pytest.raises(ValueError, match="metric='dot'"):
        RetrievalConfig(embedder="lsa", metric="dot")
    with pytest.raises(
        ValueError, match="index_search='nprobe=3' sets parameters of faiss, which index_factory='exact' does not"
    ):
        RetrievalConfig(embedder="lsa", index_factory="exact", index_search="nprobe=3")
