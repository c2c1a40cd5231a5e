"""Evaluation of a run's trained models."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from retro_jax.config import Config
from retro_jax.evaluation.perplexity import evaluate_perplexity
from retro_jax.evaluation.report import print_report
from retro_jax.prepare import Prepared
from retro_jax.training.checkpoint import LATEST
from retro_jax.training.trained import load_trained


def evaluate_trained(config: Config, prepared: Prepared, workdir: Path, console: Console, which: str | int = LATEST) -> None:
    """Evaluate the models of a workdir, write the results to ``<workdir>/evaluation`` and print the table.

    Args:
        config: names the models and says how to evaluate.
        prepared: tokenizer, held-out documents and neighbours.
        workdir: holds ``models/``.
        console: takes the table.
        which: checkpoints "latest", "best", or a step.

    Raises:
        UserError: the main model is not trained, or a model has no such checkpoint.
    """
    trained = load_trained(config, prepared.tokenizer.vocab_size, workdir, which)
    models, steps = {n: model for n, (model, _) in trained.items()}, {n: step for n, (_, step) in trained.items()}
    print_report(evaluate_perplexity(config, prepared, models, workdir / "evaluation", steps=steps), console)
