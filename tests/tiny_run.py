"""A run of a few thousand parameters, trained for a step, for tests of what is done with trained models."""

from __future__ import annotations

from pathlib import Path

from retro_jax.gin_config import load_config
from retro_jax.prepare import prepare
from retro_jax.training.train import train_all
from tests.test_commands import write_config

SETTINGS = """
include '{tiny}'
TrainConfig.steps = 1
TrainConfig.baselines = ('gpt',)
TrainConfig.valid_every = 0
ModelConfig.max_positions = 64
"""


def tiny_run(folder: Path) -> Path:
    """A Retro and its GPT with 64 learned positions in ``folder/run``; the config that they were trained with."""
    file = folder / "short.gin"
    file.write_text(SETTINGS.format(tiny=write_config(folder)))
    config = load_config([file])
    train_all(config, prepare(config, folder / "run" / "data", lambda line: None), folder / "run")
    return file
