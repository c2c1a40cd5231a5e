"""How like their neighbours the chunks are: facts of a sample, for the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.artefact import Artefact
from retro_jax.config import SPLITS, Split
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.metric import TIE_WIDTH, distances_between
from retro_jax.retrieval.neighbour_table import shared_runs
from retro_jax.retrieval.vectors import SparseVectors, open_vectors

SAMPLED = 2048
# Overlap is that of the two neighbours that the papers read, each with its continuation, as a share of the chunk's tokens.
READ, OVERLAPS = 2, (0.125, 0.25, 0.5, 0.75)


def sampled_facts(
    texts: ChunkTexts, queries: Artefact, folder: Path, seed: int, *, symmetric: bool
) -> Mapping[Split, Mapping[str, Any]]:
    """For each split, of at most ``SAMPLED`` random chunks: their number; the share that has one among its nearest two with which
    it, or the chunk after it, has a run of tokens in common that is longer than each of ``OVERLAPS``; and the share that has a
    duplicate among its saved neighbours (the same vector as what searches, up to rounding). Duplicates are not told of sparse
    vectors that search otherwise embedded than they are found (not ``symmetric``): their distances say nothing of it."""
    return {split: _facts(texts, queries, folder, split, seed, symmetric=symmetric) for split in SPLITS}


def _facts(texts: ChunkTexts, queries: Artefact, folder: Path, split: Split, seed: int, *, symmetric: bool) -> Mapping[str, Any]:
    table, found_NS = texts.table(split), np.load(folder / f"{split}.ids.npy", mmap_mode="r")
    chunks = len(found_NS)
    sample = np.sort(np.random.default_rng(seed).choice(chunks, min(SAMPLED, chunks), replace=False, shuffle=False))
    if not len(sample):
        return {"chunks": 0}
    ids_NS = np.array(found_NS[sample])
    near_NK = ids_NS[:, :READ]
    runs = shared_runs(table, texts.table("train"), np.repeat(sample, near_NK.shape[1]), near_NK.reshape(-1), 2 * table.chunk_len)
    longest_N = runs.reshape(near_NK.shape).max(axis=1)
    above = {str(share): round(float((longest_N > share * table.chunk_len).mean()), 4) for share in OVERLAPS}
    facts: dict[str, Any] = {"chunks": len(sample), "overlap_above": above}
    if symmetric or not queries.summary["sparse"]:
        facts["duplicates"] = round(float(_same_vector(queries, folder, split, sample, ids_NS).mean()), 4)
    return facts


def _same_vector(vectors: Artefact, folder: Path, split: Split, sample: np.ndarray, ids_NS: np.ndarray) -> np.ndarray:
    """Whether one of a chunk's neighbours has its vector. Of vectors of unit length, as sparse ones are, the squared L2 distance
    is twice 1 - cosine."""
    queries = open_vectors(vectors, split)
    if isinstance(queries, SparseVectors):
        distances_NS = np.load(folder / f"{split}.distances.npy", mmap_mode="r")[sample]
        return (distances_NS <= TIE_WIDTH).any(axis=1)
    database, queries_ND = open_vectors(vectors, "train"), np.array(queries.vectors_ND[sample])
    assert not isinstance(database, SparseVectors)
    apart_NS = distances_between("l2", queries_ND, database.vectors_ND, ids_NS)
    return (apart_NS <= 2 * TIE_WIDTH * np.square(queries_ND).sum(axis=1, keepdims=True)).any(axis=1)
