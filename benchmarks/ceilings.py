"""What the device reaches at most: operations a second of a large matrix product, bytes a second of a large copy, both of random
numbers (zeros are multiplied 13% faster on an H200)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Timed, interleave, spread
from retro_jax.planning.target import TARGETS


@dataclass(frozen=True)
class Sizes:
    """Side of the square matrices, bytes that are copied, dtype, and products or copies a round."""

    matrix: int
    copied: int
    dtype: str
    calls: int


GPU = Sizes(matrix=8192, copied=2**30, dtype="bfloat16", calls=5)
CPU = Sizes(matrix=1024, copied=2**27, dtype="float32", calls=2)
ROUNDS = 20


class Ceilings:
    """The two, to be timed in turn with what they are the limits of."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, dtype = sizes, jnp.dtype(sizes.dtype)
        shape = (sizes.matrix, sizes.matrix)
        a, b = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(2))
        numbers = jax.random.normal(jax.random.key(2), (sizes.copied // dtype.itemsize // 1024, 1024), dtype)
        multiply, copy = jax.jit(jnp.matmul), jax.jit(jnp.copy)
        self.calls = {"matmul": lambda: multiply(a, b), "copy": lambda: copy(numbers)}

    def timed(self) -> dict[str, Timed]:
        """Both, not yet called."""
        return {name: Timed(call, self.sizes.calls) for name, call in self.calls.items()}

    def rates(self, timed: Mapping[str, Timed]) -> dict[str, np.ndarray]:
        """Of each round: ``flops_a_second`` and ``bytes_a_second``, read and written."""
        return {
            "flops_a_second": 2 * self.sizes.matrix**3 / np.array(timed["matmul"].wall),
            "bytes_a_second": 2 * self.sizes.copied / np.array(timed["copy"].wall),
        }

    def measure(self) -> dict[str, Any]:
        """By themselves."""
        timed = self.timed()
        interleave(timed, ROUNDS)
        rates = self.rates(timed)
        return {name: spread(rate) for name, rate in rates.items()} | {"rounds": ROUNDS, "of": asdict(self.sizes)}


def data_sheet(device: str) -> dict[str, float]:
    """What the vendor says of a device; empty where the planner does not know it."""
    target = TARGETS.get(short_name(device))
    return {} if target is None else {"flops_a_second": target.flops, "bytes_a_second": target.bandwidth}


def short_name(device: str) -> str:
    """The planner's name of a device where it has one, else the device's own in small letters."""
    found = (name for name in TARGETS if name in device.lower())
    return next(found, device.lower().replace(" ", "_"))
