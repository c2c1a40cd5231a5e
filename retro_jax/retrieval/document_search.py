"""Nearest documents: each ranks by its best chunk, and the search widens until enough different ones are found."""

from __future__ import annotations

import numpy as np

from retro_jax.retrieval.index import Index
from retro_jax.retrieval.search import WIDEN
from retro_jax.retrieval.vectors import Vectors

# The first search is for so many chunks a document that is wanted.
CHUNKS_A_DOCUMENT = 3


def nearest_documents(
    index: Index, queries: Vectors, document_N: np.ndarray, wanted: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``wanted`` documents of each query whose best chunks are the nearest, ordered by (distance, id) of these.

    Args:
        index: the database.
        queries: one vector a query, as the index takes them.
        document_N: int64, the documents of the database's chunks.
        wanted: documents a query.

    Returns:
        documents int64 [Q, wanted], -1 where the database has no more; their best chunks, int64, -1 there; and distances
        float32, inf there.
    """
    Q = queries.shape[0]
    documents_QS, chunks_QS = np.full((Q, wanted), -1, np.int64), np.full((Q, wanted), -1, np.int64)
    distances_QS = np.full((Q, wanted), np.inf, np.float32)
    pending, width = np.arange(Q), CHUNKS_A_DOCUMENT * wanted
    while len(pending):
        width = min(width, index.num_chunks)
        asked = queries[pending]
        ids_PW, distances_PW = index.search(asked, width)
        whole_P = np.logical_or((ids_PW < 0).any(axis=1), width == index.num_chunks)
        edge_P = np.where(whole_P, np.float32(0), distances_PW.max(axis=1))
        edge_P -= index.rounding(asked, edge_P)
        left = []
        for query, ids_W, distances_W, whole, edge in zip(pending, ids_PW, distances_PW, whole_P, edge_P, strict=True):
            best_S = _best_chunks(ids_W, distances_W, document_N)[:wanted]
            # Behind a tie at the edge there may be a chunk of a lower id.
            if not whole and (len(best_S) < wanted or distances_W[best_S[-1]] >= edge):
                left.append(query)
                continue
            found = slice(0, len(best_S))
            chunks_QS[query, found], distances_QS[query, found] = ids_W[best_S], distances_W[best_S]
            documents_QS[query, found] = document_N[ids_W[best_S]]
        pending, width = np.array(left, np.int64), width * WIDEN
    return documents_QS, chunks_QS, distances_QS


def _best_chunks(ids_W: np.ndarray, distances_W: np.ndarray, document_N: np.ndarray) -> np.ndarray:
    """The places of each document's best chunk, nearest first."""
    order_W = np.lexsort((ids_W, distances_W))
    order_W = order_W[ids_W[order_W] >= 0]
    _, first = np.unique(document_N[ids_W[order_W]], return_index=True)
    return order_W[np.sort(first)]
