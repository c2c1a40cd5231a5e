"""Nearest chunks outside the own document: a search that widens until enough of them are found."""

from __future__ import annotations

import numpy as np

from retro_jax.retrieval.index import Index
from retro_jax.retrieval.vectors import Vectors

# The first search leaves room for this many times the wanted neighbours in the own document; widening multiplies.
OWN_ROOM, WIDEN = 2, 4
TIE_ROOM = 8


def nearest_outside(
    index: Index, queries: Vectors, own_document_Q: np.ndarray, document_N: np.ndarray, wanted: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ``wanted`` nearest chunks of each query that lie outside its own document, ordered by (distance, id).

    The search starts a little wider than wanted and widens for the queries that need it: those whose own document takes the
    room, and those where a tie at the edge leaves open which of the tied chunks have the lowest ids.

    Args:
        index: the database.
        queries: one vector a query, as the index takes them.
        own_document_Q: int64, each query's document in the database; -1 for one that is not there (held-out text).
        document_N: int64, the documents of the database's chunks, ascending.
        wanted: neighbours a query.

    Returns:
        ids int64 [Q, wanted], -1 where the database has no more, and distances float32, inf there.
    """
    own_document_Q = np.asarray(own_document_Q)
    ids_QS = np.full((len(own_document_Q), wanted), -1, np.int64)
    distances_QS = np.full(ids_QS.shape, np.inf, np.float32)
    pending = np.arange(len(own_document_Q))
    own_room = int(_own_chunks(own_document_Q, document_N).max(initial=0))
    width = wanted + TIE_ROOM + min(own_room, OWN_ROOM * wanted)
    while len(pending):
        width = min(width, index.num_chunks)
        asked = queries[pending]
        ids_PW, distances_PW = index.search(asked, width)
        whole_P = (ids_PW < 0).any(axis=1) | (width == index.num_chunks)
        edge_P = np.where(whole_P, np.float32(0), distances_PW.max(axis=1))
        edge_P -= index.rounding(asked, edge_P)
        ids_PS, found_PS = _nearest_of(ids_PW, distances_PW, own_document_Q[pending], document_N, wanted)
        done_P = whole_P | (found_PS[:, -1] < edge_P)
        ids_QS[pending[done_P], : ids_PS.shape[1]] = ids_PS[done_P]
        distances_QS[pending[done_P], : ids_PS.shape[1]] = found_PS[done_P]
        pending = pending[~done_P]
        width *= WIDEN
    return ids_QS, distances_QS


def _own_chunks(own_document_Q: np.ndarray, document_N: np.ndarray) -> np.ndarray:
    """How many chunks of the database each query's own document has."""
    return np.searchsorted(document_N, own_document_Q, side="right") - np.searchsorted(document_N, own_document_Q)


def _nearest_of(
    ids_PW: np.ndarray, distances_PW: np.ndarray, own_document_P: np.ndarray, document_N: np.ndarray, wanted: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``wanted`` of what was found, without the own document, by (distance, id)."""
    own_PW = (document_N[np.maximum(ids_PW, 0)] == own_document_P[:, None]) & (ids_PW >= 0)
    ids_PW, distances_PW = np.where(own_PW, -1, ids_PW), np.where(own_PW, np.float32(np.inf), distances_PW)
    order_PS = np.lexsort((ids_PW, distances_PW), axis=1)[:, :wanted]
    return np.take_along_axis(ids_PW, order_PS, 1), np.take_along_axis(distances_PW, order_PS, 1)
