"""How training rows are cut from the chunk table, and what share of them is padding."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retro_jax.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from retro_jax.corpus.chunk_table import ChunkTable
    from retro_jax.data.reader import RowReader

CHUNKS_READ_AT_ONCE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Every row of an epoch, by number: ``chunks_per_row`` consecutive chunks of one source; a source's last row may be short.

    ``source_chunks`` holds the first chunk of each source and the number of chunks, ``source_rows`` the same for rows.
    """

    source_chunks: np.ndarray
    chunks_per_row: int

    @property
    def source_rows(self) -> np.ndarray:
        """int64 [sources + 1]: the first row of each source, and the number of rows."""
        return np.concatenate([[0], np.cumsum(-(-np.diff(self.source_chunks) // self.chunks_per_row))]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.source_rows[-1])

    def chunk_ids(self, rows_B: np.ndarray) -> np.ndarray:
        """int64 [B, L]: the chunks of each row, -1 after its source's last."""
        rows_B = np.asarray(rows_B, np.int64)
        source_rows = self.source_rows
        source_B = np.searchsorted(source_rows, rows_B, side="right") - 1
        first_B = self.source_chunks[source_B] + (rows_B - source_rows[source_B]) * self.chunks_per_row
        ids_BL = first_B[:, None] + np.arange(self.chunks_per_row)
        return np.where(ids_BL < self.source_chunks[source_B + 1][:, None], ids_BL, -1)


def training_rows(table: ChunkTable, seq_len: int, *, weights: Sequence[float] | None) -> TrainingRows:
    """The rows of ``seq_len`` tokens that the train split gives.

    Raises:
        UserError: there is no training text, or a source with a weight has none.
    """
    source_chunks = np.asarray(table.source_chunks, np.int64)
    if source_chunks[-1] == 0:
        raise UserError(
            "the train split has no text; give more documents, or lower CorpusConfig.valid_fraction and test_fraction"
        )
    if weights is not None:
        for source in np.flatnonzero(np.diff(source_chunks) == 0).tolist():
            raise UserError(
                f"source {source} has weight {weights[source]} in CorpusConfig.weights, but no training text; "
                "leave it out of CorpusConfig.sources"
            )
    return TrainingRows(source_chunks=source_chunks, chunks_per_row=seq_len // table.chunk_len)


def describe_rows(rows: TrainingRows, reader: RowReader, *, weights: Sequence[float] | None = None) -> dict:
    """Exact counts over an epoch's rows, for the log: read in pieces, so that memory does not grow with the corpus.

    Returns:
        ``rows`` and ``text_tokens`` of an epoch; ``padding_share``: the share of row places without a text token (with
        ``weights``: expected over the mixed rows); ``chunks`` and ``chunks_short_of_neighbours``: how many are left with fewer
        than k (None for rows without neighbours).
    """
    table, neighbours, C = reader.queries, reader.neighbours, reader.queries.chunk_len
    text_S = np.zeros(len(rows.source_chunks) - 1, np.int64)
    for source, (first, last) in enumerate(itertools.pairwise(rows.source_chunks.tolist())):
        for piece in _pieces(first, last):
            text_S[source] += np.minimum(table.remaining_N[piece], C).sum(dtype=np.int64)
    places_S = np.diff(rows.source_rows) * rows.chunks_per_row * C
    share_S = places_S / places_S.sum() if weights is None else np.asarray(weights) / sum(weights)
    padding_S = np.divide(places_S - text_S, places_S, out=np.zeros(len(places_S)), where=places_S > 0)
    short = None
    if neighbours is not None:
        short = neighbours.count_short(reader.chunks.num_neighbours, keep=reader.keep)
    return {
        "rows": len(rows),
        "text_tokens": int(text_S.sum()),
        "padding_share": float(share_S @ padding_S),
        "chunks": int(rows.source_chunks[-1]),
        "chunks_short_of_neighbours": short,
    }


def _pieces(first: int, last: int) -> Iterator[slice]:
    for start in range(first, last, CHUNKS_READ_AT_ONCE):
        yield slice(start, min(start + CHUNKS_READ_AT_ONCE, last))
