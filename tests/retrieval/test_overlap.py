"""Longest common runs against a scan of every pair of positions."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from retro_jax.retrieval.overlap import PAIRS_AT_ONCE, longest_common_run


def naive_run(a: list[int], b: list[int]) -> int:
    best = 0
    for i in range(len(a)):
        for j in range(len(b)):
            n = 0
            while i + n < len(a) and j + n < len(b) and a[i + n] == b[j + n]:
                n += 1
            best = max(best, n)
    return best


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 5), st.integers(1, 9), st.integers(1, 12))
def test_equals_a_scan_of_all_positions(data: st.DataObject, rows: int, x: int, y: int) -> None:
    tokens = st.integers(0, 2)
    a = data.draw(hnp.arrays(np.int32, (rows, x), elements=tokens))
    b = data.draw(hnp.arrays(np.int32, (rows, y), elements=tokens))
    a_lengths = data.draw(hnp.arrays(np.int32, rows, elements=st.integers(0, x)))
    b_lengths = data.draw(hnp.arrays(np.int32, rows, elements=st.integers(0, y)))
    expected = [naive_run(list(a[i, : a_lengths[i]]), list(b[i, : b_lengths[i]])) for i in range(rows)]
    assert longest_common_run(a, b, a_lengths, b_lengths).tolist() == expected


def test_more_pairs_than_are_held_at_once() -> None:
    rng = np.random.default_rng(0)
    rows = PAIRS_AT_ONCE + 7
    a, b = rng.integers(0, 3, (rows, 10)), rng.integers(0, 3, (rows, 6))
    full_a, full_b = np.full(rows, 10), np.full(rows, 6)
    got = longest_common_run(a, b, full_a, full_b)
    assert got.tolist() == [naive_run(list(x), list(y)) for x, y in zip(a, b, strict=True)]


def test_padding_of_both_never_matches() -> None:
    zeros = np.zeros((1, 8), np.int32)
    assert longest_common_run(zeros, zeros, np.array([3]), np.array([5])).tolist() == [3]
    assert longest_common_run(zeros, zeros, np.array([0]), np.array([8])).tolist() == [0]


def test_unequal_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rows"):
        longest_common_run(np.zeros((2, 3)), np.zeros((1, 3)), np.ones(2), np.ones(1))
