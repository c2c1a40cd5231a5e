"""Shapes of causal attention that tests and benchmarks share, and the tiles that its kernels take."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from retro_jax.kernels.chunked_cross_attention.shapes import Blocks, at_most


class Shape(NamedTuple):
    """X rows of Q tokens, of S where keys are of more; N heads of width H, G of keys and values."""

    X: int
    Q: int
    S: int
    N: int
    G: int
    H: int


SMALL = (
    Shape(X=2, Q=20, S=20, N=2, G=2, H=16),
    Shape(X=2, Q=150, S=150, N=2, G=1, H=48),
    Shape(X=2, Q=70, S=150, N=4, G=2, H=16),
)
PUBLISHED = (
    Shape(X=8, Q=2048, S=2048, N=12, G=12, H=64),
    Shape(X=8, Q=2048, S=2048, N=16, G=16, H=96),
    Shape(X=8, Q=2048, S=2048, N=16, G=16, H=128),
    Shape(X=4, Q=4096, S=4096, N=32, G=8, H=128),
)


def query_blocks(queries: int, keys: int, width: int, dtype: Any, *, backward: bool = False) -> Blocks:
    """For a program that holds a tile of queries."""
    heavy = jnp.dtype(dtype).itemsize * width > 256
    rows = 32 if heavy else 64 if backward else 128
    return Blocks(at_most(queries, rows), at_most(keys, 32 if heavy else 64), 4 if width <= 64 and backward else 8, 2)


def key_gradient_blocks(queries: int, keys: int, width: int, dtype: Any) -> Blocks:
    """For a program that holds a tile of keys."""
    heavy = jnp.dtype(dtype).itemsize * width > 256
    return Blocks(at_most(queries, 64 if width <= 64 else 32), at_most(keys, 32 if heavy else 64), 4 if width <= 64 else 8, 2)
