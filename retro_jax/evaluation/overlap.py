"""How much of each held-out chunk stands in the training text, found by its neighbours and by an exact look-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from retro_jax.progress import progress_bar
from retro_jax.retrieval.overlap import longest_common_run

if TYPE_CHECKING:
    from retro_jax.corpus.chunk_table import ChunkTable
    from retro_jax.retrieval.neighbour_table import NeighbourTable

CHUNKS_AT_ONCE = 1024


def neighbour_runs(
    chunk_ids_N: np.ndarray,
    *,
    queries: ChunkTable,
    database: ChunkTable,
    neighbours: NeighbourTable,
    count: int,
    retrieved_len: int,
) -> np.ndarray:
    """The longest token run that each chunk shares with one of its ``count`` nearest training chunks and their continuations,
    unfiltered: int32 [N] (Borgeaud et al. 2022, section 2.6).

    Args:
        chunk_ids_N: int64, chunks of ``queries``.
        queries: the held-out split's chunks.
        database: the train split's chunks.
        neighbours: of the held-out chunks.
        count: how many neighbours to compare with (10 in the paper).
        retrieved_len: tokens of a neighbour and its continuation (at most 128 in the paper).
    """
    runs_N = np.zeros(len(chunk_ids_N), np.int32)
    with progress_bar("compare with neighbours", total=len(chunk_ids_N)) as bar:
        for start in range(0, len(chunk_ids_N), CHUNKS_AT_ONCE):
            here = slice(start, start + CHUNKS_AT_ONCE)
            chunks_NC, lengths_N = queries.gather(chunk_ids_N[here], queries.chunk_len)
            found_NKR, found_lengths_NK = database.gather(neighbours.select(chunk_ids_N[here], count), retrieved_len)
            runs_NK = longest_common_run(
                np.repeat(chunks_NC, count, axis=0),
                found_NKR.reshape(-1, retrieved_len),
                np.repeat(lengths_N, count),
                found_lengths_NK.reshape(-1),
            )
            runs_N[here] = runs_NK.reshape(-1, count).max(axis=1)
            bar.advance(len(lengths_N))
    return runs_N
