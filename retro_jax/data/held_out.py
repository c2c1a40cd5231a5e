"""Held-out documents in windows: every token is scored once, with the context of the window in which it is first seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grain
import numpy as np

from retro_jax.data.batch import Batch
from retro_jax.data.reader import RowReader
from retro_jax.retrieval.neighbour_table import KEEP_ALL, NeighbourFilter

if TYPE_CHECKING:
    from retro_jax.corpus.chunk_table import ChunkTable
    from retro_jax.retrieval.neighbour_table import NeighbourTable


@dataclass(frozen=True, kw_only=True)
class HeldOutRows:
    """Rows of L chunks: a full window, or several shorter ones as segments. Windows are never cut.

    ``chunk_ids_NL`` int64, -1 for an empty place; ``segments_NL`` int32, 0 for an empty place; ``scored_NL`` bool, the
    chunks whose targets are scored in this row (all others are context).
    """

    chunk_ids_NL: np.ndarray
    segments_NL: np.ndarray
    scored_NL: np.ndarray

    def __len__(self) -> int:
        return len(self.chunk_ids_NL)


def held_out_rows(table: ChunkTable, *, window: int, stride: int, documents: np.ndarray | None = None) -> HeldOutRows:
    """Cut documents into windows of ``window`` tokens, ``stride`` tokens apart, and put short ones together into rows.

    Args:
        table: the chunks of a held-out split.
        window: tokens of a row (T), a multiple of the chunk length.
        stride: tokens between the starts of a document's windows, a multiple of the chunk length and at most ``window``.
        documents: which documents, by number; None: all.
    """
    capacity, step = window // table.chunk_len, stride // table.chunk_len
    documents = np.arange(table.num_documents) if documents is None else np.asarray(documents)
    document_N = np.asarray(table.document_N)
    first_D = np.searchsorted(document_N, documents)
    chunks_D = np.searchsorted(document_N, documents, side="right") - first_D
    windows_D = np.where(chunks_D > 0, 1 + -(-np.maximum(chunks_D - capacity, 0) // step), 0)
    document_W = np.repeat(np.arange(len(documents)), windows_D)
    number_W = _counted(windows_D)
    start_W = number_W * step
    length_W = np.minimum(chunks_D[document_W] - start_W, capacity)
    new_from_W = np.where(number_W == 0, 0, capacity - step)
    row_W, place_W, segment_W = _pack(length_W, capacity)

    window_P = np.repeat(np.arange(len(length_W)), length_W)
    inside_P = _counted(length_W)
    at = (row_W[window_P], place_W[window_P] + inside_P)
    shape = (int(row_W.max(initial=-1)) + 1, capacity)
    rows = HeldOutRows(
        chunk_ids_NL=np.full(shape, -1, np.int64), segments_NL=np.zeros(shape, np.int32), scored_NL=np.zeros(shape, bool)
    )
    rows.chunk_ids_NL[at] = (first_D[document_W] + start_W)[window_P] + inside_P
    rows.segments_NL[at] = segment_W[window_P]
    rows.scored_NL[at] = inside_P >= new_from_W[window_P]
    return rows


def held_out_batches(
    rows: HeldOutRows, reader: RowReader, batch_size: int, *, first_batch: int = 0
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches of ``batch_size`` rows in order, read ahead in threads, the last one filled up with empty rows.

    ``loss_mask`` is 1 exactly for the targets that are scored in their row. Yields (Batch, chunk ids int64 [B, L]).
    """

    def read(number: int) -> tuple[Batch, np.ndarray]:
        here = slice(number * batch_size, (number + 1) * batch_size)
        ids_BL = _filled_up(rows.chunk_ids_NL[here], batch_size, -1)
        segments_BL = _filled_up(rows.segments_NL[here], batch_size, 0)
        return reader.read(ids_BL, segments_BL, _filled_up(rows.scored_NL[here], batch_size, False)), ids_BL

    batches = -(-len(rows) // batch_size)
    if first_batch < batches:
        numbers = grain.MapDataset.range(first_batch, batches)
        ahead = iter(numbers.map(read).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
        try:
            yield from ahead
        finally:
            ahead.close()


def target_chunks(chunk_ids_BL: np.ndarray, table: ChunkTable) -> np.ndarray:
    """The chunk that each target belongs to: int64 [B, T], -1 in empty places.

    A chunk's last token predicts the first of the next chunk; EOD belongs to the chunk that it ends.
    """
    ids_BLC = np.repeat(chunk_ids_BL[..., None], table.chunk_len, axis=-1)
    goes_on_BL = (chunk_ids_BL >= 0) & (np.asarray(table.remaining_N)[np.maximum(chunk_ids_BL, 0)] > table.chunk_len)
    ids_BLC[..., -1] += goes_on_BL
    return ids_BLC.reshape(len(ids_BLC), -1)


def shuffled_donors(
    table: ChunkTable, neighbours: NeighbourTable, k: int, *, keep: NeighbourFilter = KEEP_ALL, seed: int
) -> np.ndarray:
    """For each chunk another one whose neighbours it gets instead of its own: a permutation, int64 [chunks].

    The donor has as many neighbours (of ``k`` that pass ``keep``), so that every chunk reads as much as before, and stands in
    another document unless one document holds more than half of the chunks with as many.
    """
    count_N = (neighbours.select(np.arange(table.num_chunks), k, keep=keep) >= 0).sum(axis=-1)
    random = np.random.default_rng(seed)
    document_order_D, chunk_order_N = random.permutation(table.num_documents), random.permutation(table.num_chunks)
    document_N = np.asarray(table.document_N)
    donors_N = np.arange(table.num_chunks)
    for count in np.unique(count_N):
        group = np.flatnonzero(count_N == count)
        group = group[np.lexsort((chunk_order_N[group], document_order_D[document_N[group]]))]
        largest = np.unique(document_N[group], return_counts=True)[1].max()
        shift = largest if 2 * largest <= len(group) else max(1, len(group) // 2)
        donors_N[group] = np.roll(group, -shift)
    return donors_N


def spread_documents(table: ChunkTable, count: int | None) -> np.ndarray:
    """At most ``count`` documents, spread evenly over all sources; None: all."""
    if count is None or count >= table.num_documents:
        return np.arange(table.num_documents)
    return np.arange(count) * table.num_documents // count


def _pack(length_W: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, place in the row and number in the row (from 1) of each window: longest first, each where it fits best."""
    row_W, place_W, segment_W = (np.zeros(len(length_W), np.int64) for _ in range(3))
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    windows_in_row: list[int] = []
    for window in np.argsort(-length_W, kind="stable").tolist():
        length = int(length_W[window])
        room = next((room for room in range(length, capacity + 1) if rows_with_room[room]), None)
        if room is None:
            room = capacity
            rows_with_room[room].append(len(windows_in_row))
            windows_in_row.append(0)
        row = rows_with_room[room].pop()
        windows_in_row[row] += 1
        row_W[window], place_W[window], segment_W[window] = row, capacity - room, windows_in_row[row]
        if room > length:
            rows_with_room[room - length].append(row)
    return row_W, place_W, segment_W


def _counted(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., n - 1 for each n of ``counts``, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _filled_up(array: np.ndarray, length: int, value: int) -> np.ndarray:
    missing = length - len(array)
    return np.concatenate([array, np.full((missing, *array.shape[1:]), value, array.dtype)]) if missing else array
