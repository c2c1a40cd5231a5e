"""Chunk ids -> one batch: text, targets, segments and neighbours of many rows in two batched reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from retro_jax.data.batch import Batch

if TYPE_CHECKING:
    from retro_jax.corpus.chunk_table import ChunkTable


class LookedUp(NamedTuple):
    """The text behind a batch, before targets, positions and masks are made of it."""

    segments_BL: np.ndarray
    """int: 1, 2, ... in a row's order; 0 for an empty place."""
    text_BLE: np.ndarray
    """int32, E = C + 1: a chunk's tokens and the one after them, EOD after its document's last; 0 beyond."""
    lengths_BL: np.ndarray
    """int32: how many of them there are; 0 for an empty place."""
    neighbours_BLKR: np.ndarray
    """int32: tokens of each neighbour, nearest first; 0 beyond its document's end."""
    neighbour_lengths_BLK: np.ndarray
    """int32: how many tokens it has; 0 where it is missing."""


def look_up(
    chunk_ids_BL: np.ndarray,
    segments_BL: np.ndarray,
    neighbour_ids_BLK: np.ndarray,
    *,
    queries: ChunkTable,
    database: ChunkTable,
    retrieved_len: int,
) -> LookedUp:
    """Read the text of rows and of their neighbours.

    Args:
        chunk_ids_BL: int64, chunks of ``queries``; -1 for an empty place.
        segments_BL: int, 1, 2, ... in a row's order; 0 for an empty place. See :func:`segments_of`.
        neighbour_ids_BLK: int64, chunks of ``database``, nearest first; -1 where missing. K may be 0.
        queries: the chunk table of the rows' split.
        database: the chunk table of the train split, which all neighbours come from.
        retrieved_len: R, tokens of a neighbour: its chunk and the continuation in the same document.
    """
    text_BLE, lengths_BL = queries.gather(chunk_ids_BL, queries.chunk_len + 1, eod=True)
    neighbours_BLKR, neighbour_lengths_BLK = database.gather(neighbour_ids_BLK, retrieved_len)
    return LookedUp(segments_BL, text_BLE, lengths_BL, neighbours_BLKR, neighbour_lengths_BLK)


def make_batch(looked_up: LookedUp, scored_BL: np.ndarray | None = None) -> Batch:
    """Rows of T = L * C tokens. Targets are the document's next tokens, also past the row's end; EOD follows its last.

    Args:
        looked_up: the rows' text.
        scored_BL: bool, the chunks whose targets count; None: all.

    Returns:
        NumPy arrays.
    """
    segments_BL, text_BLE, lengths_BL, neighbours_BLKR, neighbour_lengths_BLK = looked_up
    rows, length = segments_BL.shape
    C, R = text_BLE.shape[-1] - 1, neighbours_BLKR.shape[-1]
    T = length * C
    is_text_BLC = np.arange(C, dtype=np.int32) < lengths_BL[..., None] - 1
    tokens_BLC = np.where(is_text_BLC, text_BLE[..., :-1], 0)
    targets_BLC = np.where(is_text_BLC, text_BLE[..., 1:], 0)
    positions_BLC = np.where(is_text_BLC, _first_positions(segments_BL, C)[..., None] + np.arange(C), 0)
    counts_BLC = is_text_BLC if scored_BL is None else is_text_BLC & scored_BL[..., None]
    return Batch(
        tokens=tokens_BLC.reshape(rows, T).astype(np.int32, copy=False),
        targets=targets_BLC.reshape(rows, T).astype(np.int32, copy=False),
        segments=np.where(is_text_BLC, segments_BL[..., None], 0).reshape(rows, T).astype(np.int32, copy=False),
        positions=positions_BLC.reshape(rows, T).astype(np.int32, copy=False),
        loss_mask=counts_BLC.reshape(rows, T).astype(np.float32),
        neighbours=neighbours_BLKR.astype(np.int32, copy=False),
        neighbour_mask=np.arange(R, dtype=np.int32) < neighbour_lengths_BLK[..., None],
    )


def segments_of(chunk_ids_BL: np.ndarray, document_N: np.ndarray) -> np.ndarray:
    """Number the runs of consecutive chunks of one document in each row: int32 [B, L], from 1; 0 where the id is -1.

    Args:
        chunk_ids_BL: int64, -1 for an empty place.
        document_N: the document of each chunk (``ChunkTable.document_N``).
    """
    exists_BL = chunk_ids_BL >= 0
    document_BL = np.where(exists_BL, document_N[np.maximum(chunk_ids_BL, 0)], -1)
    starts_BL = exists_BL.copy()
    follows = (chunk_ids_BL[:, 1:] == chunk_ids_BL[:, :-1] + 1) & (document_BL[:, 1:] == document_BL[:, :-1])
    starts_BL[:, 1:] &= ~follows
    return np.where(exists_BL, np.cumsum(starts_BL, axis=1), 0).astype(np.int32)


def _first_positions(segments_BL: np.ndarray, chunk_len: int) -> np.ndarray:
    """Position in its segment of each chunk's first token."""
    places_L = np.arange(segments_BL.shape[1])
    starts_BL = np.ones(segments_BL.shape, bool)
    starts_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    first_BL = np.maximum.accumulate(np.where(starts_BL, places_L, 0), axis=1)
    return (places_L - first_BL) * chunk_len
