"""Shapes of chunked cross-attention that tests and benchmarks share, and the tiles that its kernels take."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp


class Shape(NamedTuple):
    """B rows of T tokens; L chunks of C tokens, with S neighbour tokens each; N heads of width H, G of keys and values."""

    B: int
    T: int
    L: int
    C: int
    S: int
    N: int
    G: int
    H: int


# Remainders everywhere, tiles of one and of several, one and several heads a group.
SMALL = (
    Shape(B=2, T=12, L=3, C=4, S=5, N=4, G=2, H=16),
    Shape(B=1, T=40, L=2, C=20, S=33, N=2, G=2, H=48),
    Shape(B=1, T=26, L=2, C=13, S=300, N=4, G=4, H=16),
    Shape(B=1, T=30, L=3, C=10, S=24, N=8, G=1, H=32),
    Shape(B=1, T=36, L=2, C=18, S=270, N=8, G=1, H=16),
)
# RETRO's chunks of 64 tokens with neighbours of 128: heads of 64, 96 and 128, one to eight neighbours, grouped queries.
PUBLISHED = (
    Shape(B=8, T=2048, L=32, C=64, S=256, N=12, G=12, H=64),
    Shape(B=8, T=2048, L=32, C=64, S=256, N=16, G=16, H=96),
    Shape(B=8, T=2048, L=32, C=64, S=256, N=16, G=16, H=128),
    Shape(B=8, T=2048, L=32, C=64, S=128, N=16, G=16, H=128),
    Shape(B=8, T=2048, L=32, C=64, S=1024, N=16, G=16, H=128),
    Shape(B=8, T=2048, L=32, C=64, S=256, N=16, G=4, H=128),
    Shape(B=8, T=2048, L=32, C=64, S=2048, N=32, G=4, H=128),
)


class Blocks(NamedTuple):
    """Queries and keys of a tile, warps of a program, and loads under way at a time."""

    queries: int
    keys: int
    warps: int
    stages: int = 1


# What `python -m benchmarks.kernels --gpu --tune` tries.
CANDIDATES = {
    "forward": tuple(Blocks(64, keys, warps, stages) for keys in (64, 128, 256) for warps in (4, 8) for stages in (1, 2, 3)),
    "backward": tuple(
        Blocks(m, keys, warps, stages) for m in (32, 64) for keys in (32, 64, 128) for warps in (4, 8) for stages in (1, 2)
    ),
}


def forward_blocks(queries: int, keys: int, width: int, dtype: Any) -> Blocks:
    """For so many queries a program could take (those of a chunk, of all heads of a group), keys, and head width.

    Two programs share a multiprocessor, so that one loads while the other computes; one that held 256 keys would fill it.
    """
    heavy = jnp.dtype(dtype).itemsize * width > 256
    if heavy or (keys > 128 and width > 64):
        return Blocks(at_most(queries, 64), at_most(keys, 64), 4, 1 if heavy else 2)
    return Blocks(at_most(queries, 64), at_most(keys, 128), 4)


def backward_blocks(queries: int, keys: int, width: int, dtype: Any, capability: int) -> Blocks:
    """As :func:`forward_blocks`, with gradients that stay in registers.

    A chunk's queries in one tile: keys in tiles of 64, the next loaded meanwhile. More queries than that: keys in one tile if
    128 hold them, so that one kernel does. An A100, without products from shared memory, needs registers for their operands.
    """
    heavy, hopper = jnp.dtype(dtype).itemsize * width > 256, capability >= 90
    if heavy:
        return Blocks(at_most(queries, 32), at_most(keys, 32), 8)
    if queries <= 64:
        return Blocks(at_most(queries, 64), at_most(keys, 64 if hopper or width <= 64 else 32), 8, 2)
    whole = 64 < keys <= 128
    return Blocks(16 if whole and not hopper else 32, 128 if whole else at_most(keys, 64), 8)


def at_most(count: int, limit: int) -> int:
    """A power of two from 16 to ``limit``, which holds ``count`` if it can."""
    block = 16
    while block < min(count, limit):
        block *= 2
    return block
