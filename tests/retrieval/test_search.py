"""Nearest chunks outside the own document, against brute force in NumPy."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.sparse import csr_matrix

from retro_jax.retrieval import search, sparse_index
from retro_jax.retrieval.search import nearest_outside
from retro_jax.retrieval.sparse_index import SparseIndex


def brute_force(
    queries: np.ndarray, database: np.ndarray, own: np.ndarray, documents: np.ndarray, wanted: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Every cosine, sorted by (distance, id); chunks without a common column are no neighbours."""
    ids, distances = [], []
    for query, document in zip(queries, own, strict=True):
        found = [
            (np.float32(1 - query @ row), j) for j, row in enumerate(database) if documents[j] != document and (query * row).any()
        ]
        found = sorted(found)[:wanted]
        ids.append([j for _, j in found] + [-1] * (wanted - len(found)))
        distances.append([d for d, _ in found] + [np.inf] * (wanted - len(found)))
    return ids, distances


def index_of(database: np.ndarray, shards: int = 1) -> SparseIndex:
    return SparseIndex([csr_matrix(rows.T.astype(np.float32)) for rows in np.array_split(database, shards)])


# Halves and quarters: sums are exact in float32 in any order, and ties are many.
ENTRIES = st.sampled_from([0, 0, 0, 0.25, 0.5])


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(1, 60), st.integers(1, 5))
def test_equals_brute_force(
    data: st.DataObject, chunks: int, columns: int, wanted: int, results_at_once: int, shards: int
) -> None:
    database = data.draw(hnp.arrays(np.float32, (chunks, columns), elements=ENTRIES))
    documents = np.sort(data.draw(hnp.arrays(np.int64, chunks, elements=st.integers(0, 4))))
    queries = data.draw(hnp.arrays(np.float32, (7, columns), elements=ENTRIES))
    own = data.draw(hnp.arrays(np.int64, 7, elements=st.integers(-1, 4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "TIE_ROOM", 0)
        patch.setattr(search, "OWN_ROOM", 0)
        patch.setattr(sparse_index, "RESULTS_AT_ONCE", results_at_once)
        ids, distances = nearest_outside(index_of(database, shards), csr_matrix(queries), own, documents, wanted)
    expected_ids, expected_distances = brute_force(queries, database, own, documents, wanted)
    assert ids.tolist() == expected_ids
    np.testing.assert_array_equal(distances, np.array(expected_distances, np.float32))


def test_real_vectors_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    database = rng.random((300, 40)).astype(np.float32) * (rng.random((300, 40)) < 0.2)
    documents = np.sort(rng.integers(0, 20, 300))
    ids, distances = nearest_outside(index_of(database), csr_matrix(database), documents, documents, 5)
    expected_ids, expected_distances = brute_force(database, database, documents, documents, 5)
    np.testing.assert_allclose(distances, expected_distances, atol=3e-7)  # measured 1.2e-7
    assert (ids == np.array(expected_ids)).mean() > 0.999


def test_widens_past_a_document_that_takes_all_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 of 520 chunks are the query's own document and nearer than all others."""
    documents = np.array([0] * 500 + [1] * 20)
    database = np.zeros((520, 2), np.float32)
    database[:500] = [1, 0]
    database[500:] = np.stack([np.linspace(0.1, 0.9, 20), np.ones(20)], axis=1)
    widths = []
    index = index_of(database)
    monkeypatch.setattr(SparseIndex, "search", lambda self, q, w, inner=SparseIndex.search: widths.append(w) or inner(self, q, w))
    ids, _ = nearest_outside(index, csr_matrix(np.array([[1.0, 0.0]], np.float32)), np.array([0]), documents, 4)
    assert ids.tolist() == [[519, 518, 517, 516]]
    assert widths == [20, 80, 320, 520]


def test_ties_go_to_the_lowest_ids_however_many() -> None:
    database = np.ones((1000, 1), np.float32)
    documents = np.arange(1000)
    ids, distances = nearest_outside(
        index_of(database), csr_matrix(np.ones((3, 1), np.float32)), np.array([0, 2, -1]), documents, 3
    )
    assert ids.tolist() == [[1, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert (distances == 0).all()


def test_a_database_of_the_own_document_alone_gives_none() -> None:
    ids, distances = nearest_outside(
        index_of(np.ones((5, 1))), csr_matrix(np.ones((1, 1), np.float32)), np.array([0]), np.zeros(5, int), 3
    )
    assert ids.tolist() == [[-1, -1, -1]] and np.isinf(distances).all()
