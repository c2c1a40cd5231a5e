"""For how many chunks of a batch neighbours are encoded: ``TrainConfig.neighbour_capacity``.

No token reads the neighbours of a chunk that its document ends in: one chunk a document, so that the shorter documents are, the
more encoding is for nothing. With a capacity below 1 a device has places for so many of its chunks, and those that are read are
packed into them (:mod:`retro_jax.model.packing`).
"""

from __future__ import annotations

import math

import numpy as np

from retro_jax.config import Config, TrainConfig
from retro_jax.corpus.chunk_table import ChunkTable
from retro_jax.data.batch import Batch
from retro_jax.data.pipeline import row_numbers
from retro_jax.data.training_rows import TrainingRows
from retro_jax.errors import UserError

# Places come in multiples of this, which suits matrix units.
MULTIPLE = 8
SAMPLED_ROWS = 4096
# "auto" leaves room for batches so many standard deviations fuller than the mean: one in 10^9 is.
DEVIATIONS = 6.0


def num_places(config: TrainConfig, rows: int, chunks: int) -> int | None:
    """For how many of a device's ``rows * chunks`` chunks there are places; None: for all, and nothing is packed. "auto" counts
    as all where it is not known yet (:func:`automatic_capacity`)."""
    capacity = 1.0 if config.neighbour_capacity == "auto" else config.neighbour_capacity
    places = math.ceil(capacity * rows * chunks / MULTIPLE) * MULTIPLE
    return places if places < rows * chunks else None


def part_of_device(config: Config) -> tuple[int, int]:
    """Rows, and chunks of each, that a device computes at a time."""
    mesh = config.mesh
    rows = config.data.batch_size // (mesh.data * mesh.fsdp * config.training.accumulate)
    return rows, config.data.seq_len // config.chunks.chunk_len // mesh.sequence


def automatic_capacity(config: Config, rows: TrainingRows, table: ChunkTable) -> float:
    """A capacity that the batches of a run keep below, from the first few thousand rows in the order of training."""
    retro = config.model.retro
    if retro is None or retro.cross_document:
        return 1.0  # the next document reads what its document ends in
    numbers = row_numbers(rows, config.data.seed, config.corpus.weights)
    ids_NL = rows.chunk_ids(np.array([numbers[i] for i in range(SAMPLED_ROWS)]))
    read_NL = (ids_NL >= 0) & (np.asarray(table.remaining_N)[np.maximum(ids_NL, 0)] >= table.chunk_len)
    rows_of_part, chunks_of_part = part_of_device(config)
    read_P = read_NL.reshape(-1, chunks_of_part).sum(axis=1)
    most = rows_of_part * read_P.mean() + DEVIATIONS * math.sqrt(rows_of_part) * read_P.std()
    return min(1.0, float(most) / (rows_of_part * chunks_of_part))


def encoded_share(config: Config) -> float:
    """The share of the chunks that have places."""
    part = part_of_device(config)
    places = num_places(config.training, *part)
    return 1.0 if places is None else places / math.prod(part)


def refuse_too_full(config: Config, batch: Batch, step: str) -> None:
    """A device must have a place for every chunk whose neighbours are read.

    Args:
        config: of the run.
        batch: NumPy arrays, rows of whole devices.
        step: names the step in the message.

    Raises:
        UserError: there are too few.
    """
    rows, chunks = part_of_device(config)
    places, (B, L, K) = num_places(config.training, rows, chunks), batch.neighbours.shape[:3]
    if places is None or K == 0:
        return
    segments_BLC = batch.segments.reshape(B, L, -1)
    ended_BL = segments_BLC[:, :, -1] == 0
    if config.model.retro is not None and config.model.retro.cross_document:
        ended_BL[:, :-1] &= segments_BLC[:, 1:, 0] == 0
    read_BL = batch.neighbour_mask.any(axis=(2, 3)) & ~ended_BL
    # Rows are dealt to the accumulated parts in turn.
    fullest = read_BL.reshape(-1, rows, config.training.accumulate, L // chunks, chunks).sum(axis=(1, 4)).max()
    if fullest > places:
        enough = math.ceil(1000 * fullest / (rows * chunks)) / 1000
        raise UserError(
            f"{step} reads neighbours of {fullest} of the {rows * chunks} chunks of a device, which has places for {places}; "
            f"run again with TrainConfig.neighbour_capacity={enough} or more, which goes on from the last checkpoint"
        )
