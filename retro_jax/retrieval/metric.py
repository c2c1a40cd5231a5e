"""How far a chunk is from a query: the three metrics of dense vectors, computed from the vectors themselves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from retro_jax.config import Metric
from retro_jax.errors import BadInput
from retro_jax.retrieval.vectors import DenseVectors

# What a neighbour table's distances are; said in the manifest.
DISTANCES: dict[Metric, str] = {"cosine": "1 - cosine", "inner_product": "- inner product", "l2": "squared L2 distance"}
# Two distances of vectors of unit length nearer than this may be one distance that was rounded differently inside an index.
TIE_WIDTH = 1e-5
# Vectors of unit length are within this of it: bfloat16's rounding.
UNIT_WITHIN = 0.01
# Vectors that are gathered at a time: with the queries' they stay in the second-level cache.
GATHERED_AT_ONCE = 2**12
READ_AT_ONCE = 2**16


def distances_between(metric: Metric, queries_QD: np.ndarray, vectors_ND: np.ndarray, ids_QW: np.ndarray) -> np.ndarray:
    """Distances float32 [Q, W] of chunks from queries, inf where an id is -1: computed in one fixed order of sums. What an index
    tells depends on the block's shape by a rounding, and on the codes of a compressed index."""
    distances_QW = np.empty(ids_QW.shape, np.float32)
    rows_at_once = max(1, GATHERED_AT_ONCE // max(1, ids_QW.shape[1]))
    for start in range(0, len(ids_QW), rows_at_once):
        rows = slice(start, start + rows_at_once)
        found_QWD, asked_QD = vectors_ND[np.maximum(ids_QW[rows], 0)], queries_QD[rows]
        if metric == "l2":
            found_QWD -= asked_QD[:, None]
            distances_QW[rows] = np.einsum("qwd,qwd->qw", found_QWD, found_QWD)
        else:
            products_QW = np.einsum("qd,qwd->qw", asked_QD, found_QWD)
            distances_QW[rows] = 1 - products_QW if metric == "cosine" else -products_QW
    distances_QW[ids_QW < 0] = np.inf
    return distances_QW


def rounding(metric: Metric, queries_QD: np.ndarray, farthest_Q: np.ndarray, longest: float) -> np.ndarray:
    """Two distances of a query that differ by less, float32 [Q], may be one that an index rounded differently.

    Args:
        farthest_Q: the largest distance that was found for each query.
        longest: the length of the database's longest vector.
    """
    if metric == "cosine":
        return np.full(len(farthest_Q), TIE_WIDTH, np.float32)
    length_Q = np.linalg.norm(queries_QD, axis=1)
    if metric == "inner_product":
        return TIE_WIDTH * length_Q * longest
    return TIE_WIDTH * (length_Q**2 + (length_Q + np.sqrt(farthest_Q)) ** 2)  # what is found is no longer than that


def longest_vector(metric: Metric, database: DenseVectors) -> float:
    """The length of the longest vector.

    Raises:
        BadInput: a vector is not finite, or not of unit length (or zero) where the metric is the cosine.
    """
    return max((check_lengths(metric, block_ND) for block_ND in _blocks(database)), default=0.0)


def check_lengths(metric: Metric, vectors_ND: np.ndarray) -> float:
    """The length of the longest of some vectors.

    Raises:
        BadInput: see :func:`longest_vector`.
    """
    length_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))
    if not np.isfinite(length_N).all():
        raise BadInput("the embedder gave vectors that are not finite; use another precision, or another embedder")
    odd_N = (np.abs(length_N - 1) > UNIT_WITHIN) & (length_N > 0)
    if metric == "cosine" and odd_N.any():
        raise BadInput(
            f"RetrievalConfig.metric='cosine' takes vectors of unit length, but the embedder gave one of length "
            f"{length_N[odd_N][0]:.4g}; use metric='inner_product' or 'l2', or an embedder that normalises"
        )
    return float(length_N.max(initial=0.0))


def _blocks(database: DenseVectors) -> Iterator[np.ndarray]:
    for start in range(0, len(database), READ_AT_ONCE):
        yield database.rows(start, min(start + READ_AT_ONCE, len(database)))
