"""Summed losses of a model over held-out documents, chunk by chunk; a killed pass continues where it stood."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx

from retro_jax.artefact import write_bytes
from retro_jax.config import TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.data.held_out import HeldOutRows, held_out_batches, target_chunks
from retro_jax.data.reader import RowReader
from retro_jax.model import Retro
from retro_jax.progress import progress_bar
from retro_jax.training.loss import token_losses
from retro_jax.training.state import Tree
from retro_jax.training.step import cast, compute_dtype

if TYPE_CHECKING:
    from retro_jax.corpus.tokenizer import Tokenizer

SECONDS_BETWEEN_SAVES = 60.0

Step = Callable[[Batch], jax.Array]


@dataclass(frozen=True, kw_only=True)
class ChunkScores:
    """Sums over the targets of each chunk of a split: ``nats_N`` float64, their number ``targets_N`` and the UTF-8 bytes that
    they stand for ``bytes_N`` (int64). EOD counts as a target with nats and no bytes."""

    nats_N: np.ndarray
    targets_N: np.ndarray
    bytes_N: np.ndarray

    @property
    def bits_N(self) -> np.ndarray:
        """float64 [N]."""
        return self.nats_N / np.log(2.0)


def loss_step(model: Retro, config: TrainConfig, *, retrieval: bool) -> Step:
    """A compiled function from a batch to its losses in nats, float32 [B, T], 0 where the target does not count.

    Args:
        model: with its float32 parameters.
        config: tells the dtype to compute in, and how many tokens' logits exist at a time.
        retrieval: False leaves the retrieval path out.
    """
    graph, variables = nnx.split(model)
    parameters: Tree = dict(nnx.to_pure_dict(variables).items())
    state = cast(parameters, compute_dtype(config))
    return lambda batch: _losses(graph, state, jax.device_put(batch), retrieval=retrieval, chunk=config.loss_chunk)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("retrieval", "chunk"))
def _losses(graph: nnx.GraphDef, state: Tree, batch: Batch, *, retrieval: bool, chunk: int) -> jax.Array:
    model = nnx.merge(graph, state)
    hidden_BTD = model(batch, retrieval=retrieval)
    implementation = model.config.implementation
    losses_BT = token_losses(hidden_BTD, model.output_table_VD(), batch.targets, chunk=chunk, implementation=implementation)
    return losses_BT * batch.loss_mask


def score_chunks(
    step: Step, rows: HeldOutRows, reader: RowReader, tokenizer: Tokenizer, batch_size: int, *, partial: Path, key: str, name: str
) -> ChunkScores:
    """Run ``step`` over all rows and sum its losses by chunk.

    Args:
        step: see :func:`loss_step`.
        rows: windows of the documents to score.
        reader: the split's tables.
        tokenizer: tells the bytes of targets.
        batch_size: rows at a time.
        partial: a file that holds the sums so far, once a minute, until the pass ends.
        key: what the sums belong to; a partial file with another key is not continued.
        name: for the progress bar.
    """
    table, token_bytes = reader.queries, tokenizer.token_bytes()
    stored = load_scores(partial, key)
    sums, done = stored if stored is not None else (_zeros(table.num_chunks), 0)
    next_save = time.monotonic() + SECONDS_BETWEEN_SAVES
    with progress_bar(f"evaluate {name}", total=-(-len(rows) // batch_size), done=done) as bar:
        for batch, ids_BL in held_out_batches(rows, reader, batch_size, first_batch=done):
            losses_BT = np.asarray(step(batch))
            scored = batch.loss_mask > 0
            chunks = target_chunks(ids_BL, table)[scored]
            np.add.at(sums.nats_N, chunks, losses_BT[scored].astype(np.float64))
            np.add.at(sums.targets_N, chunks, 1)
            np.add.at(sums.bytes_N, chunks, token_bytes[batch.targets[scored]])
            done += 1
            bar.advance(note=f"loss {sums.nats_N.sum() / max(1, sums.targets_N.sum()):.3f}")
            if time.monotonic() >= next_save:
                save_scores(partial, key, sums, done)
                next_save = time.monotonic() + SECONDS_BETWEEN_SAVES
    if tokenizer.bos_id is not None:
        _without_prefix(sums, table.document_N, tokenizer.prefix_bytes)
    return sums


def save_scores(path: Path, key: str, scores: ChunkScores, batches: int) -> None:
    """Store sums over the first ``batches`` batches."""
    buffer = io.BytesIO()
    np.savez(buffer, key=key, batches=batches, **{field.name: getattr(scores, field.name) for field in fields(ChunkScores)})
    write_bytes(path, buffer.getvalue())


def load_scores(path: Path, key: str) -> tuple[ChunkScores, int] | None:
    """The stored sums and their number of batches; None if there are none with this key."""
    if not path.exists():
        return None
    with np.load(path) as stored:
        if str(stored["key"]) != key:
            return None
        return ChunkScores(**{field.name: stored[field.name] for field in fields(ChunkScores)}), int(stored["batches"])


def _zeros(chunks: int) -> ChunkScores:
    return ChunkScores(nats_N=np.zeros(chunks), targets_N=np.zeros(chunks, np.int64), bytes_N=np.zeros(chunks, np.int64))


def _without_prefix(sums: ChunkScores, document_N: np.ndarray, prefix_bytes: int) -> None:
    """Take off what the tokenizer put before each document: with BOS its first token is a target."""
    first_N = np.flatnonzero(np.diff(document_N, prepend=-1))
    sums.bytes_N[first_N[sums.targets_N[first_N] > 0]] -= prefix_bytes
