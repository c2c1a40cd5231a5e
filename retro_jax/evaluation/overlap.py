"""How much of each held-out chunk stands in the training text, found by its neighbours and by an exact look-up."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retro_jax.artefact import write_bytes
from retro_jax.config import Config
from retro_jax.progress import progress_bar
from retro_jax.retrieval.overlap import longest_common_run

if TYPE_CHECKING:
    from retro_jax.corpus.chunk_table import ChunkTable
    from retro_jax.prepare import Prepared
    from retro_jax.retrieval.neighbour_table import NeighbourTable
    from retro_jax.retrieval.ngrams import NgramLookup

CHUNKS_AT_ONCE = 1024
LOOKED_UP_AT_ONCE = 8192


def overlap_shares(config: Config, prepared: Prepared, documents: np.ndarray, folder: Path) -> np.ndarray:
    """The share of each held-out chunk that stands in the training text in one run: float64 [N], 0..1.

    The longest token run that the chunk shares with one of its nearest training chunks, or that the exact look-up finds
    anywhere in the training text, divided by the chunk's length. 0 for chunks of documents that are not asked for.

    Args:
        config: ``evaluation`` says which split and how many neighbours, ``chunks`` how long they are.
        prepared: the data stages' artefacts.
        documents: numbers of the documents.
        folder: keeps the result; what stands there for the same data and settings is not computed again.
    """
    evaluation, table, database = config.evaluation, prepared.tables[config.evaluation.split], prepared.tables["train"]
    settings = [evaluation.split, evaluation.overlap_neighbours, config.chunks.retrieved_len, documents.tolist()]
    key = hashlib.sha256(json.dumps([settings, prepared.fingerprints], sort_keys=True).encode()).hexdigest()
    path = folder / "overlap.npz"
    if path.exists():
        with np.load(path) as stored:
            if str(stored["key"]) == key:
                return stored["share_N"]
    chunk_ids_M = np.flatnonzero(np.isin(table.document_N, documents))
    near_M = neighbour_runs(
        chunk_ids_M,
        queries=table,
        database=database,
        neighbours=prepared.neighbours[evaluation.split],
        count=evaluation.overlap_neighbours,
        retrieved_len=config.chunks.retrieved_len,
    )
    runs_M = np.maximum(near_M, anywhere_runs(chunk_ids_M, table, prepared.ngrams))
    share_N = np.zeros(table.num_chunks)
    share_N[chunk_ids_M] = runs_M / np.minimum(table.remaining_N[chunk_ids_M], table.chunk_len)
    buffer = io.BytesIO()
    np.savez(buffer, key=key, share_N=share_N)
    write_bytes(path, buffer.getvalue())
    return share_N


def anywhere_runs(chunk_ids_N: np.ndarray, queries: ChunkTable, ngrams: NgramLookup) -> np.ndarray:
    """The longest run of at least eight tokens of each chunk that stands anywhere in the training text: int32 [N], 0 for
    none."""
    runs_N = np.zeros(len(chunk_ids_N), np.int32)
    with progress_bar("look up in all training text", total=len(chunk_ids_N)) as bar:
        for start in range(0, len(chunk_ids_N), LOOKED_UP_AT_ONCE):
            here = slice(start, start + LOOKED_UP_AT_ONCE)
            tokens_NC, lengths_N = queries.gather(chunk_ids_N[here], queries.chunk_len)
            runs_N[here] = ngrams.longest_run(tokens_NC, lengths_N)
            bar.advance(len(lengths_N))
    return runs_N


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
