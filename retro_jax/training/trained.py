"""The trained models of a workdir."""

from __future__ import annotations

from pathlib import Path

from retro_jax.config import Config
from retro_jax.model import Retro
from retro_jax.training.checkpoint import LATEST, load_model
from retro_jax.training.loop import CHECKPOINTS
from retro_jax.training.train import MODELS, model_configs


def load_trained(config: Config, tokenizer_size: int, workdir: Path, which: str | int = LATEST) -> dict[str, tuple[Retro, int]]:
    """The run's models with the steps of their checkpoints, the main one first; baselines not yet trained are left out, with a
    line that says so.

    Args:
        config: names the models.
        tokenizer_size: the tokenizer's vocabulary.
        workdir: holds ``models/``.
        which: "latest", "best", or a step.

    Raises:
        UserError: the main model is not trained, or a model has no such checkpoint.
    """
    models: dict[str, tuple[Retro, int]] = {}
    for name in model_configs(config, tokenizer_size):
        folder = workdir / MODELS / name
        if models and not (folder / CHECKPOINTS).is_dir():
            print(f"{name}: not trained yet, left out", flush=True)
        else:
            models[name] = load_model(folder, which)
    return models
