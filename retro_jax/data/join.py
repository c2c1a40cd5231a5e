"""The ``joined`` stage: training rows with their neighbours, looked up once and stored in the order in which they are read."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from retro_jax.artefact import MANIFEST, build_artefact, open_artefact
from retro_jax.blocks import Block, keep_blocks_of, run_blocks
from retro_jax.config import Config
from retro_jax.data.joined_rows import JOINED, REBUILD, RECORD_VERSION, JoinedRows, RowRecord
from retro_jax.data.pipeline import row_numbers
from retro_jax.data.reader import RowReader, open_reader
from retro_jax.data.training_rows import TrainingRows, training_rows
from retro_jax.errors import UserError
from retro_jax.retrieval.memory import in_words

if TYPE_CHECKING:
    from retro_jax.prepare import Prepared

# One record a chunk of the file, so that a host that reads its share of each batch reads nothing else.
WRITER_OPTIONS = "group_size:1,zstd:1,max_parallelism:1"
SHARD_BYTES = 256 * 2**20
# What array_record adds at most: to a record that zstd does not shrink, and to a shard (its index, and the rest of a block).
RECORD_OVERHEAD, SHARD_OVERHEAD = 128, 2**18
ROWS_AT_ONCE = 64


def build_joined(config: Config, data_dir: Path, prepared: Prepared, *, epochs: int | None = None) -> JoinedRows:
    """Build or open ``<data_dir>/joined``: the rows that training reads first, in its order.

    The order depends on ``DataConfig.seed``, ``CorpusConfig.weights`` and the rows; not on batch size, hosts or workers.

    Args:
        config: the run's settings.
        data_dir: the artefacts' folder.
        prepared: the tables behind the rows.
        epochs: store so many times the rows of an epoch; None: as many rows as ``TrainConfig.steps`` read.

    Raises:
        UserError: there is too little space, or what stands there has other settings or fewer rows.
    """
    path = Path(data_dir) / JOINED
    reader = open_reader(config, prepared, "train", neighbours=True)
    rows = training_rows(reader.queries, config.data.seq_len, weights=config.corpus.weights)
    record = row_record(config, prepared.tokenizer.vocab_size)
    wanted = rows_to_join(config) if epochs is None else epochs * len(rows)
    stored = open_artefact(path, JOINED, checksums="none").summary["rows"] if (path / MANIFEST).exists() else None
    count = wanted if stored is None else stored
    if stored is None:
        _check_space(path, count, record)
    build_artefact(
        path,
        kind=JOINED,
        settings={
            "seq_len": config.data.seq_len,
            "num_neighbours": config.chunks.num_neighbours,
            "retrieved_len": config.chunks.retrieved_len,
            "max_overlap": config.data.max_overlap,
            "neighbour_sources": config.data.neighbour_sources,
            "seed": config.data.seed,
            "weights": config.corpus.weights,
            "rows": count,
            "record_version": RECORD_VERSION,
        },
        inputs={name: prepared.fingerprints[name] for name in ("chunks", "neighbours")},
        make=lambda folder: _write_shards(
            folder,
            _Rows(rows=rows, reader=reader, record=record, seed=config.data.seed, weights=config.corpus.weights),
            count,
            workers=config.retrieval.workers,
        ),
        checksums="none",
    )
    if count < wanted:
        raise UserError(
            f"{path} holds {count:,} training rows, and {wanted:,} are asked for (TrainConfig.steps * DataConfig.batch_size, or "
            f"--join-epochs); store more with `{REBUILD}`, or set DataConfig.rows='gathered'"
        )
    return JoinedRows(path)


def rows_to_join(config: Config) -> int:
    """How many rows training reads."""
    return config.training.steps * config.data.batch_size


def row_record(config: Config, vocab_size: int) -> RowRecord:
    """The record of one row."""
    chunks = config.chunks
    return RowRecord(
        chunks_per_row=config.data.seq_len // chunks.chunk_len,
        chunk_len=chunks.chunk_len,
        num_neighbours=chunks.num_neighbours,
        retrieved_len=chunks.retrieved_len,
        vocab_size=vocab_size,
    )


def space_needed(count: int, record: RowRecord) -> int:
    """Bytes that so many rows take at most."""
    return count * (record.dtype.itemsize + RECORD_OVERHEAD) + len(_shards(count, record)) * SHARD_OVERHEAD


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """What a worker process needs to write rows."""

    rows: TrainingRows
    reader: RowReader
    record: RowRecord
    seed: int
    weights: Sequence[float] | None

    def records(self, places: range) -> Iterator[bytes]:
        """The rows at these places of training's order."""
        numbers = row_numbers(self.rows, self.seed, self.weights)
        for first in range(0, len(places), ROWS_AT_ONCE):
            rows_B = np.asarray([numbers[place] for place in places[first : first + ROWS_AT_ONCE]], np.int64)
            yield from self.record.encode(rows_B, self.reader.look_up(self.rows.chunk_ids(rows_B)))


def _check_space(path: Path, count: int, record: RowRecord) -> None:
    """Say what the rows will take, before anything is written.

    Raises:
        UserError: more than is free.
    """
    needed, free = in_words(space_needed(count, record)), shutil.disk_usage(path.parent).free
    done = sum(shard.stat().st_size for shard in path.with_name(path.name + ".partial").glob("*.array_record"))
    print(
        f"{count:,} joined training rows of {record.dtype.itemsize:,} bytes take at most {needed} in "
        f"{len(_shards(count, record)):,} shards; {in_words(free)} are free in {path.parent}",
        file=sys.stderr,
    )
    if space_needed(count, record) - done > free:
        raise UserError(
            f"{count:,} joined training rows take up to {needed}, but {in_words(free)} are free in {path.parent}; "
            "free some space, use another Config.data_dir, or store fewer rows (--join-epochs, TrainConfig.steps)"
        )


def _shards(count: int, record: RowRecord) -> list[range]:
    """The places in training's order that each shard holds."""
    size = _rows_per_shard(record)
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _rows_per_shard(record: RowRecord) -> int:
    return max(1, SHARD_BYTES // record.dtype.itemsize)


def _write_shards(folder: Path, rows: _Rows, count: int, *, workers: int) -> Mapping:
    shards, size = _shards(count, rows.record), _rows_per_shard(rows.record)
    keep_blocks_of(folder, size)
    paths = [folder / f"rows-{number:05d}-of-{len(shards):05d}.array_record" for number in range(len(shards))]
    run_blocks(
        folder,
        _write_shard,
        ((path, rows, places) for path, places in zip(paths, shards, strict=True)),
        workers=workers,
        description="joined: shards of training rows",
        total=len(shards),
        describe=lambda task: task[0].name,
    )
    return {
        "rows": count,
        "shards": len(shards),
        "bytes": sum(path.stat().st_size for path in paths),
        "rows_per_shard": size,
        "record": dataclasses.asdict(rows.record),
    }


def _write_shard(path: Path, rows: _Rows, places: range) -> Block:
    """Write a shard so that the file is whole or not there; nothing else is stored of it as a block."""
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    try:
        with _system_errors(path):
            writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
            for record in rows.records(places):
                writer.write(record)
            writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return {}


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """array_record tells of a full disk in words alone."""
    try:
        yield
    except RuntimeError as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise
