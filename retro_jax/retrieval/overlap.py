"""Longest common token runs of many pairs at once: what near-duplicate filters and the leakage report measure."""

from __future__ import annotations

import numpy as np

# Pairs whose running lengths stay in the second-level cache together.
PAIRS_AT_ONCE = 1024


def longest_common_run(a_NX: np.ndarray, b_NY: np.ndarray, a_lengths_N: np.ndarray, b_lengths_N: np.ndarray) -> np.ndarray:
    """The longest run of consecutive tokens that stands in both sequences of each pair.

    Args:
        a_NX, b_NY: token ids, integers; what stands beyond the lengths is ignored.
        a_lengths_N, b_lengths_N: how many tokens of each row count, 0 for none.

    Returns:
        int32 [N], 0 where no token is shared.

    Raises:
        ValueError: the arrays do not have the same number of rows.
    """
    rows = {len(a_NX), len(b_NY), len(a_lengths_N), len(b_lengths_N)}
    if len(rows) != 1:
        raise ValueError(f"a_NX, b_NY and their lengths have {sorted(rows)} rows; give all the same number")
    runs_N = np.zeros(len(a_NX), np.int32)
    if a_NX.shape[1] > b_NY.shape[1]:
        a_NX, b_NY, a_lengths_N, b_lengths_N = b_NY, a_NX, b_lengths_N, a_lengths_N
    for start in range(0, len(a_NX), PAIRS_AT_ONCE):
        rows_here = slice(start, start + PAIRS_AT_ONCE)
        a_XN = _masked(a_NX[rows_here], a_lengths_N[rows_here], -1)
        b_YN = _masked(b_NY[rows_here], b_lengths_N[rows_here], -2)
        runs_N[rows_here] = _longest_on_diagonals(a_XN, b_YN)
    return runs_N


def _masked(tokens_NX: np.ndarray, lengths_N: np.ndarray, filler: int) -> np.ndarray:
    """Tokens transposed, with a filler that no other sequence holds beyond each length."""
    inside_NX = np.arange(tokens_NX.shape[1]) < np.asarray(lengths_N)[:, None]
    return np.ascontiguousarray(np.where(inside_NX, tokens_NX, filler).T)


def _longest_on_diagonals(a_XN: np.ndarray, b_YN: np.ndarray) -> np.ndarray:
    """One running length for each diagonal y - x, so that a step of x touches a contiguous slice of them in place."""
    X, Y, N = len(a_XN), len(b_YN), a_XN.shape[1]
    dtype = np.int16 if min(X, Y) < 2**15 else np.int32
    running, best = np.zeros((X + Y, N), dtype), np.zeros((X + Y, N), dtype)
    for x in range(X):
        diagonals = slice(X - 1 - x, X - 1 - x + Y)
        running[diagonals] += 1
        running[diagonals] *= b_YN == a_XN[x]
        np.maximum(best[diagonals], running[diagonals], out=best[diagonals])
    return best.max(axis=0)
