"""The chunk grid against loops over tokens."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.model.grid import chunk_tokens, in_chunks, reader_positions, reads, trailing_first_chunk_len

C = 4
FIRST = np.array([1, 2, 3, 4], np.int32)


def chunk_of(token: int, first: int) -> int:
    """The chunk that a token lies in."""
    return 0 if token < first else (token - first) // C + 1


def test_trailing_first_chunk_len_ends_the_last_chunk_at_the_rows_end():
    for length in range(1, 30):
        first = trailing_first_chunk_len(length, C)
        assert 1 <= first <= C
        assert (length - first) % C == 0
    assert [trailing_first_chunk_len(n, 8) for n in (24, 28, 29, 1)] == [8, 4, 5, 1]


@pytest.mark.parametrize("length", [8, 10, 13])
@pytest.mark.parametrize("num_chunks", [2, 3, 4])
def test_in_chunks(length, num_chunks):
    x = np.random.default_rng(0).standard_normal((4, length, 2)).astype(np.float32)
    chunks, valid = in_chunks(jnp.asarray(x), num_chunks, C, jnp.asarray(FIRST))
    expected, expected_valid = np.zeros((4, num_chunks, C, 2), np.float32), np.zeros((4, num_chunks, C), bool)
    for b, first in enumerate(FIRST):
        for token in range(length):
            chunk = chunk_of(token, first)
            if chunk < num_chunks:
                place = token if chunk == 0 else (token - first) % C
                expected[b, chunk, place], expected_valid[b, chunk, place] = x[b, token], True
    np.testing.assert_array_equal(chunks, expected)
    np.testing.assert_array_equal(valid, expected_valid)


def test_in_chunks_of_a_row_on_the_grid():
    x = np.arange(24, dtype=np.float32).reshape(1, 12, 2)
    chunks, valid = in_chunks(jnp.asarray(x), 3, C, None)
    np.testing.assert_array_equal(chunks, x.reshape(1, 3, 4, 2))
    assert np.asarray(valid).all()


@pytest.mark.parametrize("cross_document", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_reads(cross_document, aligned):
    random = np.random.default_rng(1)
    B, T, L = 4, 12, 3
    first = None if aligned else jnp.asarray(FIRST)
    for _ in range(20):
        cuts = np.sort(random.integers(0, T + 1, (B, 3)), axis=1)
        segments = (np.arange(T)[None] >= cuts[:, :1]).astype(np.int32) + (np.arange(T)[None] >= cuts[:, 1:2])
        segments[np.arange(T)[None] >= cuts[:, 2:]] = 0
        chunk_valid = random.random((B, L)) < 0.7
        got = reads(
            jnp.asarray(segments), jnp.asarray(chunk_valid), chunk_len=C, first_chunk_len_B=first, cross_document=cross_document
        )
        expected = np.zeros((B, T), bool)
        for b in range(B):
            f = C if aligned else int(FIRST[b])
            for i in range(T):
                ended = [u for u in range(L) if f - 1 + u * C <= i]  # chunks whose last token is at or before i
                if not ended or segments[b, i] == 0 or i - (f - 1 + ended[-1] * C) >= C:
                    continue
                own = segments[b, f - 1 + ended[-1] * C] == segments[b, i]
                expected[b, i] = chunk_valid[b, ended[-1]] and (own or cross_document)
        np.testing.assert_array_equal(got, expected)


def test_tokens_past_the_last_chunks_readers_read_nothing():
    got = reads(
        jnp.ones((1, 12), jnp.int32),
        jnp.ones((1, 1), bool),
        chunk_len=C,
        first_chunk_len_B=jnp.asarray([2]),
        cross_document=False,
    )
    np.testing.assert_array_equal(got[0], [False] + [True] * 4 + [False] * 7)


def test_chunk_tokens_are_those_of_the_document_that_reads():
    segments = np.array([[1, 1, 2, 2, 2, 2, 2, 0, 3, 3, 3, 3], [1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]], np.int32)
    got = chunk_tokens(jnp.asarray(segments), 3, C, None, cross_document=False)
    # Chunk 0 of row 0 ends in document 2: document 1's tokens in it are hidden. Chunk 1 ends in padding: nobody reads it.
    np.testing.assert_array_equal(got[0], [[False, False, True, True], [False] * 4, [True] * 4])
    np.testing.assert_array_equal(got[1], [[False] * 3 + [True], [True] * 4, [True] * 4])
    across = chunk_tokens(jnp.asarray(segments), 3, C, None, cross_document=True)
    np.testing.assert_array_equal(across, (segments > 0).reshape(2, 3, 4))
    short = chunk_tokens(jnp.asarray(segments), 3, C, jnp.asarray([3, 1], jnp.int32), cross_document=False)
    # f = 3: chunks are tokens 0-2, 3-6, 7-10 (padding, then document 3).
    np.testing.assert_array_equal(short[0], [[False, False, True, False], [True] * 4, [False, True, True, True]])
    # f = 1: chunks are token 0, tokens 1-4 (two of document 1, then two of document 2), tokens 5-8.
    np.testing.assert_array_equal(short[1], [[True, False, False, False], [False, False, True, True], [True] * 4])


def test_reader_positions_put_a_chunks_last_token_beside_the_neighbours_cth():
    """Relative distance i - i' + C - 1 of RETRO, where i counts from the chunk's last token and i' is the key's place."""
    for first in (None, jnp.asarray(FIRST)):
        got = np.asarray(reader_positions(13, C, first))
        for row, f in zip(got, [C] if first is None else FIRST, strict=True):
            for i in range(13):
                last = f - 1
                while i >= last + C:
                    last += C
                if i >= last:
                    assert row[i] == (i - last) + C - 1
