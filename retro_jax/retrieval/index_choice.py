"""Which index so many dense vectors get."""

from __future__ import annotations

import math

from retro_jax.retrieval.exact_index import EXACT

# Up to here an exact scan is fast enough; above the second the vectors themselves are too many to keep in the index.
EXACT_UP_TO = 131_072
VECTORS_UP_TO = 4_194_304


def chosen_factory(factory: str, chunks: int, dim: int) -> tuple[str, str]:
    """The factory string to use where ``factory`` is configured, and why."""
    if factory == EXACT:
        return EXACT, "as configured; every chunk is compared, in JAX"
    return automatic_factory(chunks, dim) if factory == "auto" else (factory, "as configured")


def automatic_factory(chunks: int, dim: int) -> tuple[str, str]:
    """A faiss factory string for so many vectors, and why."""
    if chunks <= EXACT_UP_TO:
        return "Flat", f"{chunks} chunks, not above {EXACT_UP_TO}: an exact scan is fast enough"
    lists = 2 ** round(math.log2(4 * math.sqrt(chunks)))
    if chunks <= VECTORS_UP_TO:
        return (
            f"IVF{lists},Flat",
            f"{chunks} chunks, not above {VECTORS_UP_TO}: about 4 sqrt(chunks) inverted lists of whole vectors",
        )
    code = next(size for size in (64, 32, 16, 8, 4, 2, 1) if dim % size == 0)
    return (
        f"OPQ{code},IVF{lists}_HNSW32,PQ{code}",
        f"{chunks} chunks, above {VECTORS_UP_TO}: inverted lists found through an HNSW graph, vectors coded in {code} bytes",
    )
