"""The rule for a kernel's error: a multiple of what a plain computation in the same dtype makes."""

from __future__ import annotations

from typing import Any

import numpy as np

FACTORS = {"forward": 2.0, "backward": 3.0}


def largest_errors(ours: Any, plain: Any, exact: Any) -> tuple[float, float]:
    """The largest error of ``ours`` and of ``plain`` against ``exact``."""
    exact = np.asarray(exact, np.float64)
    ours, plain = (float(np.abs(np.asarray(a, np.float64) - exact).max()) for a in (ours, plain))
    return ours, plain
