"""Which chunks stand in which row, and what is padding."""

import numpy as np
import pytest

from retro_jax.data.training_rows import describe_rows, training_rows
from retro_jax.errors import UserError
from tests.data.memory import MemoryChunks, MemoryNeighbours, memory_reader

# C = 4; source 0: documents of 10 and 4 tokens (4 chunks), source 1: one of 9 (3 chunks), source 2: none
TABLE = MemoryChunks([list(range(10)), list(range(4)), list(range(9))], 4, source_documents=[2, 1, 0])


def test_rows_are_consecutive_chunks_of_one_source():
    rows = training_rows(TABLE, 12, weights=None)
    assert len(rows) == 3
    np.testing.assert_array_equal(rows.chunk_ids([2, 0, 1]), [[4, 5, 6], [0, 1, 2], [3, -1, -1]])


def test_counts():
    rows = training_rows(TABLE, 12, weights=None)
    neighbours = MemoryNeighbours([[1, 2], [1, -1], [-1, -1], [0, 1], [2, 3], [3, 2], [5, -1]])
    facts = describe_rows(rows, memory_reader(TABLE, neighbours))
    assert facts == {"rows": 3, "text_tokens": 23, "padding_share": 13 / 36, "chunks": 7, "chunks_short_of_neighbours": 3}
    assert describe_rows(rows, memory_reader(TABLE, neighbours, k=1))["chunks_short_of_neighbours"] == 1
    assert describe_rows(rows, memory_reader(TABLE, None))["chunks_short_of_neighbours"] is None


def test_padding_of_a_mix_follows_the_weights():
    table = MemoryChunks([list(range(10)), list(range(4)), list(range(9))], 4, source_documents=[2, 1])
    rows = training_rows(table, 12, weights=(3.0, 1.0))
    expected = 0.75 * (24 - 14) / 24 + 0.25 * (12 - 9) / 12
    assert describe_rows(rows, memory_reader(table, None), weights=(3.0, 1.0))["padding_share"] == pytest.approx(expected)


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="the train split has no text"):
        training_rows(MemoryChunks([], 4), 8, weights=None)
    with pytest.raises(UserError, match=r"source 2 has weight 0.2 in CorpusConfig.weights, but no training text"):
        training_rows(TABLE, 12, weights=(0.4, 0.4, 0.2))
