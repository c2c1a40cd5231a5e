"""Training rows with their neighbours inline: one record a row, in array_record shards that training reads from front to end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from retro_jax.artefact import open_artefact
from retro_jax.corpus.token_store import token_dtype
from retro_jax.data.rows import LookedUp, make_batch
from retro_jax.errors import UserError

if TYPE_CHECKING:
    from retro_jax.data.batch import Batch

JOINED = "joined"
RECORD_VERSION = 1
# The reader neither reads ahead nor starts threads of its own: the kernel reads ahead, and batches are read ahead of training.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
REBUILD = "python -m retro_jax prepare --config FILE --rebuild joined"


@dataclass(frozen=True, kw_only=True)
class RowRecord:
    """How a row stands in its record: always as many bytes, little-endian, nothing between the fields.

    ``version`` uint16 and ``row`` int64, its number among the rows of an epoch; then what :class:`~retro_jax.data.rows.LookedUp`
    holds of it: ``segments`` [L], ``lengths`` [L] and ``neighbour_lengths`` [L, K] as int32, ``text`` [L, C + 1] and
    ``neighbours`` [L, K, R] as uint16 where the vocabulary fits into it, else int32. Lengths stand for masks.
    """

    chunks_per_row: int
    chunk_len: int
    num_neighbours: int
    retrieved_len: int
    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        """The record as a NumPy type."""
        L, C, K, R = self.chunks_per_row, self.chunk_len, self.num_neighbours, self.retrieved_len
        token = token_dtype(self.vocab_size).newbyteorder("<")
        return np.dtype(
            [
                ("version", "<u2"),
                ("row", "<i8"),
                ("segments", "<i4", (L,)),
                ("lengths", "<i4", (L,)),
                ("text", token, (L, C + 1)),
                ("neighbour_lengths", "<i4", (L, K)),
                ("neighbours", token, (L, K, R)),
            ]
        )

    def encode(self, rows_B: np.ndarray, looked_up: LookedUp) -> list[bytes]:
        """The records of these rows."""
        records_B = np.zeros(len(rows_B), self.dtype)
        records_B["version"], records_B["row"] = RECORD_VERSION, rows_B
        records_B["segments"], records_B["lengths"] = looked_up.segments_BL, looked_up.lengths_BL
        records_B["text"], records_B["neighbours"] = looked_up.text_BLE, looked_up.neighbours_BLKR
        records_B["neighbour_lengths"] = looked_up.neighbour_lengths_BLK
        assert (records_B["text"] == looked_up.text_BLE).all() and (records_B["neighbours"] == looked_up.neighbours_BLKR).all()
        return [record.tobytes() for record in records_B]

    def decode(self, records: list[bytes], *, neighbours: bool) -> tuple[np.ndarray, LookedUp]:
        """The rows' numbers, int64 [B], and their text; without ``neighbours`` K is 0.

        Raises:
            ValueError: a record is of another version or length.
        """
        if any(len(record) != self.dtype.itemsize for record in records):
            raise ValueError(f"not all records have {self.dtype.itemsize} bytes")
        records_B, K = np.frombuffer(b"".join(records), self.dtype), self.num_neighbours if neighbours else 0
        if (records_B["version"] != RECORD_VERSION).any():
            raise ValueError(f"not all records have version {RECORD_VERSION}")
        looked_up = LookedUp(
            segments_BL=records_B["segments"],
            text_BLE=records_B["text"].astype(np.int32),
            lengths_BL=records_B["lengths"],
            neighbours_BLKR=records_B["neighbours"][:, :, :K].astype(np.int32),
            neighbour_lengths_BLK=records_B["neighbour_lengths"][:, :, :K],
        )
        return records_B["row"], looked_up


class JoinedRows:
    """The first rows that training reads, in its order, as the artefact at ``path`` holds them.

    Attributes:
        path: the artefact's folder.
        record: how a row is stored.
    """

    def __init__(self, path: Path) -> None:
        artefact = open_artefact(path, JOINED, checksums="none")  # array_record checks the hash of each record that is read
        self.path, self.record = Path(path), RowRecord(**artefact.summary["record"])
        self._rows: int = artefact.summary["rows"]
        self._rows_per_shard: int = artefact.summary["rows_per_shard"]
        self._shards = [self.path / name for name in sorted(artefact.manifest["files"])]
        self._opened: dict[int, ArrayRecordReader] = {}

    def __reduce__(self) -> tuple:
        return JoinedRows, (self.path,)  # a copy in another process opens the shards again

    def __len__(self) -> int:
        return self._rows

    def read(self, first: int, rows_B: np.ndarray, *, neighbours: bool = True) -> Batch:
        """The batch of rows ``first``, ``first + 1``, ... in the order of training, which are numbers ``rows_B`` of an epoch.

        Raises:
            UserError: a shard is damaged, or other rows stand there.
        """
        records: list[bytes] = []
        while len(records) < len(rows_B):
            shard, start = divmod(first + len(records), self._rows_per_shard)
            records += self._read_shard(shard, start, min(start + len(rows_B) - len(records), self._rows_per_shard))
        try:
            stored_B, looked_up = self.record.decode(records, neighbours=neighbours)
        except ValueError as error:
            raise UserError(f"{self.path} is not as its manifest says ({error}); rebuild it with `{REBUILD}`") from None
        if (stored_B != rows_B).any():
            raise UserError(
                f"{self.path} holds row {stored_B[stored_B != rows_B][0]} where training reads row "
                f"{rows_B[stored_B != rows_B][0]}; rebuild it with `{REBUILD}`, or set DataConfig.rows='gathered'"
            )
        return make_batch(looked_up)

    def _read_shard(self, shard: int, start: int, stop: int) -> list[bytes]:
        path = self._shards[shard]
        try:
            if shard not in self._opened:
                reader = ArrayRecordReader(str(path), READER_OPTIONS)
                self._opened = {**{n: opened for n, opened in self._opened.items() if n == shard - 1}, shard: reader}
            return self._opened[shard].read(start, stop)
        except RuntimeError as error:
            raise UserError(f"{path} cannot be read ({error}); rebuild it with `{REBUILD}`") from None
