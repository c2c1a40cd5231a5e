"""Nearest documents by their best chunks, against brute force in NumPy."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.sparse import csr_matrix

from retro_jax.retrieval import document_search
from retro_jax.retrieval.document_search import nearest_documents
from retro_jax.retrieval.sparse_index import SparseIndex

# Halves and quarters: sums are exact in float32 in any order, and ties are many.
ENTRIES = st.sampled_from([0, 0, 0, 0.25, 0.5])


def brute_force(query: np.ndarray, database: np.ndarray, documents: np.ndarray, wanted: int) -> list[tuple[int, int, float]]:
    """(document, chunk, distance), each document once, by its best chunk."""
    found = sorted((1 - float(query @ row), chunk) for chunk, row in enumerate(database) if (query * row).any())
    best: dict[int, tuple[int, int, float]] = {}
    for distance, chunk in found:
        best.setdefault(int(documents[chunk]), (int(documents[chunk]), chunk, distance))
    return [*best.values(), *[(-1, -1, np.inf)] * wanted][:wanted]


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 6), st.integers(1, 8))
def test_equals_brute_force(data: st.DataObject, chunks: int, columns: int, wanted: int) -> None:
    database = data.draw(hnp.arrays(np.float32, (chunks, columns), elements=ENTRIES))
    documents = np.sort(data.draw(hnp.arrays(np.int64, chunks, elements=st.integers(0, 9))))
    queries = data.draw(hnp.arrays(np.float32, (5, columns), elements=ENTRIES))
    index = SparseIndex([csr_matrix(database.T)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_search, "CHUNKS_A_DOCUMENT", 1)
        found = nearest_documents(index, csr_matrix(queries), documents, wanted)
    for query, *rows in zip(queries, *found, strict=True):
        assert list(zip(*rows, strict=True)) == brute_force(query, database, documents, wanted)


def test_widens_past_a_document_that_takes_all_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest 500 chunks are of one document; the others come one a document."""
    documents = np.array([0] * 500 + list(range(1, 21)))
    database = np.zeros((520, 2), np.float32)
    database[:500] = [1, 0]
    database[500:] = np.stack([np.linspace(0.9, 0.1, 20), np.ones(20)], axis=1)
    widths: list[int] = []
    search = SparseIndex.search
    monkeypatch.setattr(SparseIndex, "search", lambda self, q, w: widths.append(w) or search(self, q, w))
    found, chunks, _ = nearest_documents(
        SparseIndex([csr_matrix(database.T)]), csr_matrix([[1.0, 0.0]], dtype=np.float32), documents, 4
    )
    assert found.tolist() == [[0, 1, 2, 3]] and chunks.tolist() == [[0, 500, 501, 502]]
    assert widths == [12, 48, 192, 520]
