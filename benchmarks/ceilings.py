"""What the device reaches at most: operations a second of a large matrix product, bytes a second of a large copy, both of random
numbers (zeros are multiplied 13% faster on an H200)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Timed, interleave, spread
from retro_jax.planning.target import TARGETS


@dataclass(frozen=True)
class Sizes:
    """Side of the square matrices, bytes that are copied, dtype; rounds, and products or copies a round."""

    matrix: int
    copied: int
    dtype: str
    rounds: int
    calls: int


GPU = Sizes(matrix=8192, copied=2**30, dtype="bfloat16", rounds=20, calls=5)
CPU = Sizes(matrix=1024, copied=2**27, dtype="float32", rounds=20, calls=5)


def measure(sizes: Sizes) -> dict[str, Any]:
    """Rates of the two, round by round in turn; ``flops_a_second`` and ``bytes_a_second`` (read and written) are medians."""
    dtype = jnp.dtype(sizes.dtype)
    side, count = sizes.matrix, sizes.copied // dtype.itemsize
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    numbers = jax.random.normal(jax.random.key(2), (count // 1024, 1024), dtype)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(jnp.copy)
    timed = {"matmul": Timed(lambda: multiply(a, b), sizes.calls), "copy": Timed(lambda: copy(numbers), sizes.calls)}
    interleave(timed, sizes.rounds)
    flops = 2 * side**3 / np.array(timed["matmul"].wall)
    moved = 2 * sizes.copied / np.array(timed["copy"].wall)
    return {
        "flops_a_second": float(np.median(flops)),
        "bytes_a_second": float(np.median(moved)),
        "tflops": spread(flops / 1e12),
        "gigabytes_a_second": spread(moved / 1e9),
        "of": asdict(sizes),
    }


def data_sheet(device: str) -> dict[str, float]:
    """What the vendor says of a device; empty where the planner does not know it."""
    target = TARGETS.get(short_name(device))
    return {} if target is None else {"flops_a_second": target.flops, "bytes_a_second": target.bandwidth}


def short_name(device: str) -> str:
    """The planner's name of a device where it has one, else the device's own in small letters."""
    found = (name for name in TARGETS if name in device.lower())
    return next(found, device.lower().replace(" ", "_"))
