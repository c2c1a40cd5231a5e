"""The training pipeline: shuffled, mixed, repeated rows, read ahead in threads or processes, continued bit-equal.

The order of rows depends on the seed, the weights and the batch size alone: not on processes, workers or how often it was
stopped. Row numbers are batched first and every process gathers its own share of a batch, all chunks of it at once.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

from retro_jax.config import DataConfig
from retro_jax.data.batch import Batch
from retro_jax.data.joined_rows import REBUILD, JoinedRows
from retro_jax.data.reader import RowReader
from retro_jax.data.training_rows import TrainingRows
from retro_jax.errors import UserError
from retro_jax.executor.processes import die_with

THREADS = 2
ALL = slice(None)
# Rows enough for any run. Without an end grain counts batches of one row in floating point, to one more than an index can be.
ENDLESS = 2**53

BatchAndIds = tuple[Batch, np.ndarray]


class TrainingBatches(grain.DatasetIterator[BatchAndIds]):
    """Endless batches: (Batch of NumPy arrays with this process's rows, chunk ids int64 [B, L]); joined rows end somewhere, which
    is a UserError.

    A grain iterator, so that ``grain.checkpoint.CheckpointSave(batches)`` stores it and ``CheckpointRestore`` continues it.
    Its state is the number of the next batch: the same on every process, for every number of workers and for joined rows.
    """

    def __init__(
        self, batches: grain.MapDataset[BatchAndIds], config: DataConfig, *, num_rows: int, threads: int = THREADS
    ) -> None:
        super().__init__()
        self._batches, self._config, self._threads = batches, config, threads
        self._order = {"seed": config.seed, "batch_size": config.batch_size, "seq_len": config.seq_len, "rows": num_rows}
        self._next_batch = 0
        self._ahead: grain.DatasetIterator[BatchAndIds] | None = None

    def __next__(self) -> BatchAndIds:
        if self._ahead is None:
            self._ahead = iter(self._read_ahead())
        try:
            element = next(self._ahead)
        except StopIteration:
            raise UserError(
                f"the joined training rows end after batch {self._next_batch}; store more with `{REBUILD}`, "
                "or set DataConfig.rows='gathered'"
            ) from None
        self._next_batch += 1
        return element

    def get_state(self) -> dict:
        """The number of the next batch, and what decides the order of rows."""
        return {"next_batch": self._next_batch, **self._order}

    def set_state(self, state: dict) -> None:
        """Continue at a stored state.

        Raises:
            UserError: the state belongs to rows in another order.
        """
        for name, value in self._order.items():
            if state[name] != value:
                raise UserError(
                    f"the checkpoint was trained on batches with {name}={state[name]}, now {name}={value} is asked for; "
                    "use the old value, or another --workdir"
                )
        self.close()
        self._next_batch = state["next_batch"]

    def start_prefetch(self) -> None:
        """Begin to read before the first batch is asked for."""
        if self._ahead is None:
            self._ahead = iter(self._read_ahead())
        self._ahead.start_prefetch()

    def close(self) -> None:
        """Stop reading ahead and end the worker processes. The next batch starts them again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _read_ahead(self) -> grain.IterDataset[BatchAndIds]:
        batches = self._batches[self._next_batch :]
        workers, prefetch = self._config.workers, self._config.prefetch
        if workers == 0:
            return batches.to_iter_dataset(
                grain.ReadOptions(num_threads=min(self._threads, prefetch), prefetch_buffer_size=prefetch)
            )
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's processes read absl flags, which only absl.app parses
        in_worker = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-prefetch // workers))
        return in_worker.mp_prefetch(processes, worker_init_fn=functools.partial(_start_worker, os.getpid()))


def training_batches(
    rows: TrainingRows,
    reader: RowReader,
    config: DataConfig,
    *,
    weights: Sequence[float] | None = None,
    rows_here: slice = ALL,
    joined: JoinedRows | None = None,
) -> TrainingBatches:
    """Batches of ``config.batch_size`` rows over all processes; each reads its contiguous share of them.

    Args:
        rows: the rows of an epoch.
        reader: the train split's tables; without neighbours it gives a plain GPT the identical rows.
        config: seed, batch size, workers and prefetch.
        weights: each source's share of rows; None: every row once an epoch. Rows are reshuffled each epoch.
        rows_here: which rows of a batch this process reads.
        joined: the same rows as they were stored in this order; None: they are looked up in the tables. The batches are equal
            bit for bit.
    """
    numbers = row_numbers(rows, config.seed, weights)[:ENDLESS].batch(config.batch_size)
    if joined is None:
        return TrainingBatches(numbers.map(_Read(rows, reader, rows_here)), config, num_rows=len(rows))
    stored = numbers[: len(joined) // config.batch_size]
    batches = stored.map_with_index(_ReadJoined(rows, joined, reader.neighbours is not None, rows_here))
    # One thread: the file is read from front to end.
    return TrainingBatches(batches, config, num_rows=len(rows), threads=1)


def row_numbers(rows: TrainingRows, seed: int, weights: Sequence[float] | None) -> grain.MapDataset[int]:
    """Row numbers without end, in the order of training."""
    if weights is None:
        return grain.MapDataset.range(len(rows)).shuffle(seed=_shuffle_seed(seed, 0)).repeat()
    bounds = rows.source_rows.tolist()
    sources = [
        grain.MapDataset.range(first, last).shuffle(seed=_shuffle_seed(seed, number)).repeat()
        for number, (first, last) in enumerate(itertools.pairwise(bounds))
    ]
    return grain.MapDataset.mix(sources, weights=weights)


@dataclass(frozen=True)
class _Read:
    """From the row numbers of a whole batch to this process's part of it."""

    rows: TrainingRows
    reader: RowReader
    here: slice

    def __call__(self, rows_B: np.ndarray) -> BatchAndIds:
        chunk_ids_BL = self.rows.chunk_ids(rows_B[self.here])
        return self.reader.read(chunk_ids_BL), chunk_ids_BL


@dataclass(frozen=True)
class _ReadJoined:
    """From the number of a batch and its row numbers to this process's part of it."""

    rows: TrainingRows
    joined: JoinedRows
    neighbours: bool
    here: slice

    def __call__(self, batch: int, rows_B: np.ndarray) -> BatchAndIds:
        first = batch * len(rows_B) + range(len(rows_B))[self.here].start
        batch_here = self.joined.read(first, rows_B[self.here], neighbours=self.neighbours)
        return batch_here, self.rows.chunk_ids(rows_B[self.here])


def _shuffle_seed(seed: int, source: int) -> int:
    """grain takes the seed of epoch e as this plus e: spread, so that sources and seeds do not repeat each other's orders."""
    return int(np.random.SeedSequence([seed, source]).generate_state(1)[0])


def _start_worker(parent: int, worker: int, workers: int) -> None:
    die_with(parent)
