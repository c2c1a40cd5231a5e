"""A tiny run on synthetic batches, here or in a process that a test kills: ``python -m tests.training.tiny FOLDER JSON``."""

from __future__ import annotations

import json
import resource
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import grain
import numpy as np

from retro_jax.config import (
    ChunkConfig,
    Config,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RetroConfig,
    TrainConfig,
)
from retro_jax.data.batch import Batch
from retro_jax.data.pipeline import ALL
from retro_jax.errors import UserError
from retro_jax.parallel.layout import make_layout
from retro_jax.parallel.processes import join_processes
from retro_jax.training.loop import Job, fit

V, B, L, C, K, R = 64, 4, 2, 8, 2, 16


def tiny_config(mesh: MeshConfig = MeshConfig(), **settings: Any) -> Config:  # noqa: B008  frozen
    """A run of 12 steps that saves, validates and logs often; ``settings`` are of TrainConfig."""
    chunks = ChunkConfig(chunk_len=C, num_neighbours=K, retrieved_len=R)
    encoder = EncoderConfig(num_layers=1)
    retro = RetroConfig(chunks=chunks, encoder=encoder, cca_layers=(1,), neighbour_dropout=0.2)
    settings = {"steps": 12, "log_every": 3, "checkpoint_every": 4, "valid_every": 2, "valid_batches": 2, **settings}
    return Config(
        chunks=chunks,
        data=DataConfig(seq_len=L * C, batch_size=B),
        model=ModelConfig(vocab_size=V, width=16, num_layers=1, num_heads=2, dropout=0.1, norm="rmsnorm", retro=retro),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        training=TrainConfig(**settings),
        mesh=mesh,
        evaluation=EvalConfig(window=L * C, stride=L * C),
    )


def random_batch(seed: int, *, rows: int = B) -> tuple[Batch, np.ndarray]:
    """Random rows with padding at their ends, and chunk ids that tell the seed."""
    random, T = np.random.default_rng(seed), L * C
    text = np.arange(T) < random.integers(T // 2, T + 1, (rows, 1))
    batch = Batch(
        tokens=random.integers(0, V, (rows, T), dtype=np.int32),
        targets=random.integers(0, V, (rows, T), dtype=np.int32),
        segments=text.astype(np.int32),
        positions=np.tile(np.arange(T, dtype=np.int32), (rows, 1)),
        loss_mask=text.astype(np.float32),
        neighbours=random.integers(0, V, (rows, L, K, R), dtype=np.int32),
        neighbour_mask=random.random((rows, L, K, R)) < 0.9,
    )
    return batch, seed * 1000 + np.arange(rows * L).reshape(rows, L)


def tiny_batches(spoilt: int | None = None, wait: float = 0.0, rows_here: slice = ALL) -> grain.DatasetIterator:
    """Endless shuffled batches; the ``spoilt``-th (from 0) makes the loss NaN, each takes ``wait`` seconds to read."""

    def read(number: int) -> tuple[Batch, np.ndarray]:
        time.sleep(wait)
        batch, ids = random_batch(number)
        batch, ids = Batch(*(array if array is None else array[rows_here] for array in batch)), ids[rows_here]
        return (batch._replace(loss_mask=batch.loss_mask * np.nan) if number == spoilt else batch), ids

    numbers = grain.MapDataset.range(1000) if spoilt is not None else grain.MapDataset.range(1000).shuffle(seed=3).repeat()
    return iter(numbers.map(read).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def run(folder: Path, config: Config, *, spoilt: int | None = None, wait: float = 0.0, model: ModelConfig | None = None) -> int:
    """Train in ``folder``; how many steps were run."""
    job = Job(name="tiny", config=config, model=model or config.model, folder=folder, config_text="tiny = 1")
    layout = make_layout(config.mesh)
    rows_here = ALL if layout is None else layout.rows_here(B)
    return fit(job, tiny_batches(spoilt, wait, rows_here), lambda: [random_batch(-seed % 10_000) for seed in (1, 2)])


def main() -> None:
    """The settings after the folder are JSON: TrainConfig's, ``spoilt`` and ``wait`` of :func:`tiny_batches`, ``mesh`` of
    MeshConfig, ``processes`` (coordinator, how many, which one), and ``largest_file``, the bytes that no file may grow beyond."""
    settings = json.loads(sys.argv[2])
    if processes := settings.pop("processes", None):
        coordinator, count, number = processes
        join_processes(Namespace(distributed=True, coordinator=coordinator, processes=count, process=number))
    settings["mesh"] = MeshConfig(**settings.pop("mesh", {}))
    if limit := settings.pop("largest_file", None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    own = {name: settings.pop(name) for name in ("spoilt", "wait") if name in settings}
    try:
        run(Path(sys.argv[1]), tiny_config(**settings), **own)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
