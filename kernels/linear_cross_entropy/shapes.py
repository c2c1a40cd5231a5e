"""Sizes that tests, benchmarks and tuning share."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """N tokens of width D, a vocabulary of V, ``chunk`` tokens' logits at a time."""

    N: int
    D: int
    V: int
    chunk: int


# One chunk, even chunks, a remainder, chunks of one token, a vocabulary of more than one block of a kernel and no multiple of it.
SMALL = (
    Shape(16, 4, 11, 100),
    Shape(16, 4, 11, 4),
    Shape(21, 5, 13, 4),
    Shape(5, 3, 7, 1),
    Shape(18, 4, 2500, 7),
)
# Published models: GPT-2's vocabulary rounded up (RETRO 1.5B), InstructRetro 9.5B, Llama 3's vocabulary.
LARGE = (
    Shape(16384, 2048, 50304, 2048),
    Shape(8192, 4096, 256000, 2048),
    Shape(16384, 2560, 128256, 2048),
)
