"""Rows on a tiny corpus, written out by hand."""

import numpy as np
import pytest

from retro_jax.data.rows import look_up, make_batch, segments_of
from tests.data.disk import write_tables
from tests.data.memory import EOD, MemoryChunks

# chunks (C = 4): 0 = 1 2 3 4, 1 = 5 6 7 8, 2 = 9 10 | 3 = 11 12 13 14 | 4 = 15
DOCUMENTS = [list(range(1, 11)), [11, 12, 13, 14], [15]]
# chunks: 0 = 21 22 23 24, 1 = 25 26 27 28, 2 = 29 | 3 = 30 31
DATABASE = [list(range(21, 30)), [30, 31]]


@pytest.fixture(params=["memory", "disk"])
def rows(request, tmp_path):
    """Reads rows of the documents above, from tables in memory or on disk."""
    if request.param == "memory":
        queries, database = MemoryChunks(DOCUMENTS, 4), MemoryChunks(DATABASE, 4)
    else:
        tables = write_tables(tmp_path, {"train": DATABASE, "test": DOCUMENTS}, 4)
        queries, database = tables["test"], tables["train"]

    def read(ids, neighbours=None, scored=None):
        ids = np.asarray(ids, np.int64)
        neighbours = np.full((*ids.shape, 2), -1) if neighbours is None else np.asarray(neighbours, np.int64)
        segments = segments_of(ids, queries.document_N)
        return make_batch(look_up(ids, segments, neighbours, queries=queries, database=database, retrieved_len=8), scored)

    return read


def test_document_borders_row_ends_and_end_of_document(rows):
    batch = rows([[0, 1], [2, 3], [4, -1]])
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 0, 0, 11, 12, 13, 14], [15] + [0] * 7])
    # The first row ends inside document 0: its last target is read past the row's end.
    np.testing.assert_array_equal(batch.targets, [[2, 3, 4, 5, 6, 7, 8, 9], [10, EOD, 0, 0, 12, 13, 14, EOD], [EOD] + [0] * 7])
    np.testing.assert_array_equal(batch.segments, [[1] * 8, [1, 1, 0, 0, 2, 2, 2, 2], [1] + [0] * 7])
    # Document 0 goes on in the second row, with positions from 0.
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 0, 0, 0, 1, 2, 3], [0] * 8])
    np.testing.assert_array_equal(batch.loss_mask, [[1] * 8, [1, 1, 0, 0, 1, 1, 1, 1], [1] + [0] * 7])
    assert batch.first_chunk_len is None
    for name in ("tokens", "targets", "segments", "positions", "neighbours"):
        assert getattr(batch, name).dtype == np.int32, name
    assert batch.loss_mask.dtype == np.float32 and batch.neighbour_mask.dtype == bool


def test_neighbours_are_the_chunk_and_its_continuation_masked_at_the_documents_end(rows):
    batch = rows([[0, 1]], [[[1, -1], [0, 3]]])
    assert batch.neighbours.shape == (1, 2, 2, 8)
    np.testing.assert_array_equal(batch.neighbours[0, 0], [[25, 26, 27, 28, 29, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(batch.neighbour_mask[0, 0], [[True] * 5 + [False] * 3, [False] * 8])
    np.testing.assert_array_equal(batch.neighbours[0, 1], [[21, 22, 23, 24, 25, 26, 27, 28], [30, 31, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.neighbour_mask[0, 1], [[True] * 8, [True] * 2 + [False] * 6])


def test_no_neighbours_asked_for(rows):
    batch = rows([[0, 1]], np.zeros((1, 2, 0)))
    assert batch.neighbours.shape == batch.neighbour_mask.shape == (1, 2, 0, 8)


def test_scored_chunks(rows):
    batch = rows([[0, 1], [2, 3]], scored=np.array([[False, True], [True, False]]))
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.targets[0], [2, 3, 4, 5, 6, 7, 8, 9])


@pytest.mark.parametrize(
    ("ids", "segments"),
    [
        ([0, 1, 2, 3, 4], [1, 1, 1, 2, 3]),
        ([2, 3, -1, -1], [1, 2, 0, 0]),
        ([1, 2, 0, 1], [1, 1, 2, 2]),  # two windows of one document
        ([0, 2, 3, -1], [1, 2, 3, 0]),
        ([-1, -1], [0, 0]),
    ],
)
def test_segments_are_runs_of_one_document(ids, segments):
    table = MemoryChunks(DOCUMENTS, 4)
    np.testing.assert_array_equal(segments_of(np.array([ids]), table.document_N), [segments])
