"""Training steps of random rows, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.timing import Timed, interleave
from retro_jax.config import ChunkConfig, ModelConfig, OptimizerConfig, TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.training.optimizer import is_trained, make_optimizer
from retro_jax.training.state import initial_state, model_form
from retro_jax.training.step import make_train_step


def step_ratio(config: ModelConfig, other: ModelConfig, *, rows: int, length: int, rounds: int = 25) -> float:
    """How many times as long a training step of ``config`` takes as one of ``other``: the median over rounds, by wall time."""
    train = TrainConfig()
    sides = {name: Timed(stepper(c, random_rows(c, rows, length), train), 2) for name, c in (("one", config), ("other", other))}
    interleave(sides, rounds)
    return float(np.median(np.array(sides["one"].wall) / np.array(sides["other"].wall)))


def stepper(config: ModelConfig, batch: Batch, train: TrainConfig) -> Callable[[], Any]:
    """One training step at each call, the state donated, as in training."""
    form = model_form(config, is_trained(config))
    optimizer = make_optimizer(OptimizerConfig(), 1000, form.trained)
    step = jax.jit(make_train_step(form, optimizer, train), donate_argnums=0)
    carried = [initial_state(form, optimizer, 0)]
    on_device = jax.device_put(batch)

    def call() -> Any:
        carried[0], metrics = step(carried[0], on_device)
        return metrics

    return call


def random_rows(config: ModelConfig, rows: int, length: int) -> Batch:
    """A batch of random tokens, whole rows of one document each, with neighbours of random tokens for a Retro."""
    random, retro = np.random.default_rng(0), config.retro
    chunks = ChunkConfig() if retro is None else retro.chunks
    shape = (rows, length // chunks.chunk_len, 0 if retro is None else chunks.num_neighbours, chunks.retrieved_len)
    assert config.vocab_size is not None
    tokens, targets = (random.integers(0, config.vocab_size, (rows, length), np.int32) for _ in range(2))
    return Batch(
        tokens=tokens,
        targets=targets,
        segments=np.ones((rows, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        loss_mask=np.ones((rows, length), np.float32),
        neighbours=random.integers(0, config.vocab_size, shape, np.int32),
        neighbour_mask=np.ones(shape, bool),
    )
