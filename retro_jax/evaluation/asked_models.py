"""The trained models of a workdir, ready to be asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from retro_jax.config import Config, GenerateConfig
from retro_jax.evaluation.outputs import Answerer
from retro_jax.generation.opening import Opened, open_engine
from retro_jax.generation.prompt import Completion, Prompt
from retro_jax.training.loop import CHECKPOINTS
from retro_jax.training.train import MODELS, model_configs


def open_models(
    config: Config, generate: GenerateConfig, data_dir: Path, workdir: Path, which: str | int, tokenizer_size: int
) -> dict[str, Opened]:
    """Each model of the run that is trained, the main one first; baselines not yet trained are left out, with a line
    that says so.

    Raises:
        UserError: the main model is not trained, or there is no such checkpoint.
    """
    opened: dict[str, Opened] = {}
    asked = dataclasses.replace(config, generation=generate)
    for name in model_configs(config, tokenizer_size):
        if opened and not (workdir / MODELS / name / CHECKPOINTS).is_dir():
            print(f"{name}: not trained yet, left out", flush=True)
        else:
            opened[name] = open_engine(asked, data_dir, workdir, model=name, checkpoint=which)
    return opened


def answerer(opened: Opened, config: GenerateConfig) -> Answerer:
    """What completes prompts as ``config`` says."""

    def answer(prompts: Sequence[Prompt], done: Collection[int]) -> Iterator[tuple[int, Completion]]:
        for number, _, completion in opened.engine.stream(prompts, config, done):
            if completion is not None:
                yield number, completion

    return answer
