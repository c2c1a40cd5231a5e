"""Sides timed in turn in one process, so that a slow minute of the machine slows all of them; and how figures are told."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MATRIX = 1024


class Timed:
    """Wall and CPU seconds of one call, round after round: ``calls`` are asked for, then ``wait`` waits for the last."""

    def __init__(self, call: Callable[[], Any], calls: int = 1, wait: Callable[[Any], Any] = jax.block_until_ready) -> None:
        self.call, self.calls, self.wait = call, calls, wait
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def round(self) -> None:
        """One more round."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.calls):
            result = self.call()
        self.wait(result)
        self.wall.append((time.perf_counter() - wall) / self.calls)
        self.cpu.append((time.process_time() - cpu) / self.calls)


def interleave(sides: Mapping[str, Timed], rounds: int) -> None:
    """Rounds of all sides in turn, after one of each that compiles and is not counted."""
    for side in sides.values():
        side.round()
        side.wall.clear(), side.cpu.clear()
    for _ in range(rounds):
        for side in sides.values():
            side.round()


def product() -> Callable[[], Any]:
    """A square float32 matrix product."""
    a, b = (jax.random.normal(jax.random.key(i), (MATRIX, MATRIX), jnp.float32) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(a, b)


def spread(values: np.ndarray) -> dict:
    """Median, quartiles and the extremes."""
    least, low, median, high, most = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    numbers = {"median": median, "quartiles": [low, high], "range": [least, most]}
    return json.loads(json.dumps(numbers), parse_float=lambda text: float(f"{float(text):.4g}"))


def cpu_name() -> str:
    """The processor, as /proc/cpuinfo names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
