"""Bootstrap intervals of figures that are functions of means over items."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LEVEL = 0.95
# Draws at once: their counts take so many numbers at most.
NUMBERS_AT_ONCE = 2**24

Means = dict[str, np.ndarray]


def means_with_intervals(
    scores: dict[str, np.ndarray], *, samples: int, seed: int, combined: Callable[[Means], Means] | None = None
) -> dict[str, dict[str, float]]:
    """The mean of each score over the items, with its 95% percentile interval over resampled items.

    Args:
        scores: float [items] by name; all of the same items, which are drawn together.
        samples: how many times the items are drawn with replacement.
        seed: of the draws.
        combined: further figures from the means, for example a geometric mean of some; gets and gives arrays [samples].

    Returns:
        By name {"value", "low", "high"}.
    """
    names, values_IM = list(scores), np.stack([np.asarray(column, np.float64) for column in scores.values()], axis=1)
    items = len(values_IM)

    def figures(means_SM: np.ndarray) -> Means:
        means = dict(zip(names, means_SM.T, strict=True))
        return means | (combined(means) if combined is not None else {})

    rng, drawn = np.random.default_rng(seed), []
    for start in range(0, samples, at_once := max(1, NUMBERS_AT_ONCE // items)):
        counts_SI = rng.multinomial(items, np.full(items, 1 / items), size=min(at_once, samples - start))
        drawn.append(counts_SI @ values_IM / items)
    seen, spread = figures(values_IM.mean(axis=0)[None]), figures(np.concatenate(drawn))
    edges = (50 * (1 - LEVEL), 50 * (1 + LEVEL))
    intervals = {name: np.percentile(values, edges) for name, values in spread.items()}
    return {
        name: {"value": float(value[0]), "low": float(intervals[name][0]), "high": float(intervals[name][1])}
        for name, value in seen.items()
    }
