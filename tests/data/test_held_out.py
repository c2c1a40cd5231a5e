"""Held-out windows: every target once, context where promised, neighbours swapped as promised."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.held_out import held_out_batches, held_out_rows, shuffled_donors, spread_documents, target_chunks
from tests.data.memory import EOD, MemoryChunks, MemoryNeighbours, memory_reader

C = 4


def documents(lengths):
    """Documents in which every token is another: the t-th token of document d is 1000 (d + 1) + t."""
    return [[1000 * (d + 1) + t for t in range(n)] for d, n in enumerate(lengths)]


def test_windows_of_a_long_document_and_short_ones_together():
    # Documents of 6, 1 and 2 chunks in windows of 3 chunks, 2 apart: 0 1 2 | 2 3 4 | 4 5, then the short ones.
    table = MemoryChunks(documents([22, 3, 8]), C)
    rows = held_out_rows(table, window=12, stride=8)
    np.testing.assert_array_equal(rows.chunk_ids_NL, [[0, 1, 2], [2, 3, 4], [4, 5, -1], [7, 8, 6]])
    np.testing.assert_array_equal(rows.segments_NL, [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 2]])
    np.testing.assert_array_equal(rows.scored_NL, [[True] * 3, [False, True, True], [False, True, False], [True] * 3])


def test_batches_are_filled_up_with_empty_rows():
    table = MemoryChunks(documents([22, 3, 8]), C)
    batches = list(held_out_batches(held_out_rows(table, window=12, stride=8), memory_reader(table), 3))
    assert [ids.shape for _, ids in batches] == [(3, 3), (3, 3)]
    batch, ids = batches[1]
    np.testing.assert_array_equal(ids, [[7, 8, 6], [-1] * 3, [-1] * 3])
    np.testing.assert_array_equal(batch.positions[0], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0])
    np.testing.assert_array_equal(batch.loss_mask.sum(axis=1), [11, 0, 0])
    again = list(held_out_batches(held_out_rows(table, window=12, stride=8), memory_reader(table), 3, first_batch=1))
    np.testing.assert_array_equal(again[0][0].tokens, batch.tokens)
    assert len(again) == 1 and not list(
        held_out_batches(held_out_rows(table, window=12, stride=8), memory_reader(table), 3, first_batch=2)
    )


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=12),
    window=st.integers(1, 6),
    stride=st.integers(1, 6),
    batch_size=st.integers(1, 4),
)
def test_every_target_once_in_its_chunk_with_the_context_of_its_window(lengths, window, stride, batch_size):
    stride = min(stride, window)
    table = MemoryChunks(documents(lengths), C)
    rows = held_out_rows(table, window=window * C, stride=stride * C)
    seen = []
    for batch, ids in held_out_batches(rows, memory_reader(table), batch_size):
        chunks = target_chunks(ids, table)
        for row, position in np.argwhere(batch.loss_mask):
            token, target = batch.tokens[row, position], batch.targets[row, position]
            document, at = divmod(token, 1000)
            assert target == (token + 1 if at + 1 < lengths[document - 1] else EOD)
            belongs = (
                table.document_N[chunks[row, position]],
                chunks[row, position] - np.searchsorted(table.document_N, document - 1),
            )
            last_chunk = (lengths[document - 1] - 1) // C
            assert belongs == (document - 1, min((at + 1) // C, last_chunk))
            # The context goes back to the start of the first window that holds the token.
            number = max(0, -(-(at // C - window + 1) // stride))
            context = batch.positions[row, position]
            assert context == at - number * stride * C
            span = slice(position - context, position + 1)
            np.testing.assert_array_equal(batch.tokens[row, span], token - np.arange(context, -1, -1))
            assert len(set(batch.segments[row, span])) == 1
            seen.append(token)
    assert sorted(seen) == sorted(t for d in documents(lengths) for t in d)


def test_documents_are_never_cut_across_segments_and_segments_never_shared():
    table = MemoryChunks(documents([4] * 7 + [9] * 3), C)
    rows = held_out_rows(table, window=16, stride=8)
    for ids, segments in zip(rows.chunk_ids_NL, rows.segments_NL, strict=True):
        for segment in range(1, segments.max() + 1):
            assert len(set(table.document_N[ids[segments == segment]])) == 1
    assert (rows.chunk_ids_NL >= 0).sum() == 16 and len(rows) == 4


def test_some_documents_only():
    table = MemoryChunks(documents([5, 3, 22, 8]), C)
    rows = held_out_rows(table, window=12, stride=12, documents=np.array([0, 3]))
    assert sorted(set(table.document_N[rows.chunk_ids_NL[rows.chunk_ids_NL >= 0]])) == [0, 3]
    np.testing.assert_array_equal(spread_documents(table, 2), [0, 2])
    np.testing.assert_array_equal(spread_documents(table, None), [0, 1, 2, 3])


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 5), data=st.data())
def test_shuffled_neighbours_come_from_another_document_and_are_as_many(lengths, seed, data):
    table = MemoryChunks(documents(lengths), C)
    missing = data.draw(st.lists(st.integers(0, 2), min_size=table.num_chunks, max_size=table.num_chunks))
    ids = np.where(np.arange(2) < 2 - np.array(missing)[:, None], 10 * np.arange(table.num_chunks)[:, None] + np.arange(2), -1)
    donors = shuffled_donors(table, MemoryNeighbours(ids), 2, seed=seed)
    assert sorted(donors) == list(range(table.num_chunks))
    np.testing.assert_array_equal((ids[donors] >= 0).sum(1), (ids >= 0).sum(1))
    np.testing.assert_array_equal(donors, shuffled_donors(table, MemoryNeighbours(ids), 2, seed=seed))
    for count in set(missing):
        group = np.flatnonzero(np.array(missing) == count)
        if len(group) > 1:
            assert (donors[group] != group).all()
        if 2 * max(np.unique(table.document_N[group], return_counts=True)[1]) <= len(group):
            assert (table.document_N[donors[group]] != table.document_N[group]).all()


def test_shuffled_and_missing_neighbours_are_read():
    table = MemoryChunks(documents([8, 8, 8]), C)
    neighbours = MemoryNeighbours([[2, 3], [4, 5], [0, 1], [5, 4], [1, 0], [3, 2]])
    ids = np.array([[0, 1, -1]])
    own = memory_reader(table, neighbours).read(ids)
    assert own.neighbours[0, 0, 0, 0] == 2000 and own.neighbours[0, 1, 0, 0] == 3000
    donors = np.array([5, 0, 1, 2, 3, 4])
    others = memory_reader(table, neighbours, donors=donors).read(ids)
    np.testing.assert_array_equal(
        others.neighbours[0, 0], memory_reader(table, neighbours).read(np.array([[5]])).neighbours[0, 0]
    )
    np.testing.assert_array_equal(others.neighbours[0, 1], own.neighbours[0, 0])
    assert not others.neighbour_mask[0, 2].any()
    np.testing.assert_array_equal(others.tokens, own.tokens)
    none = memory_reader(table, neighbours, donors=np.full(6, -1)).read(ids)
    assert not none.neighbour_mask.any() and none.neighbour_mask.shape == own.neighbour_mask.shape
