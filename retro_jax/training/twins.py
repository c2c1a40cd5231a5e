"""A Retro's two baselines: the same decoder without retrieval, and one widened to as many parameters."""

from __future__ import annotations

import dataclasses

from retro_jax.config import Baseline, ModelConfig
from retro_jax.errors import UserError
from retro_jax.model import count_parameters

TOLERANCE = 0.01
FFN_MULTIPLE = 8


def model_name(config: ModelConfig) -> str:
    """The name that the main model's folder gets."""
    return "gpt" if config.retro is None else "retro"


def twin(config: ModelConfig, baseline: Baseline) -> ModelConfig:
    """The config of a Retro's baseline.

    Raises:
        UserError: the model has no retrieval, so it has no twin; or no width matches it.
    """
    if config.retro is None:
        raise UserError(
            f"TrainConfig.baselines names {baseline!r}, but ModelConfig.retro is None: the model is a GPT itself; "
            "set TrainConfig.baselines=()"
        )
    return gpt_twin(config) if baseline == "gpt" else matched_gpt(config)


def gpt_twin(config: ModelConfig) -> ModelConfig:
    """The same decoder without retrieval."""
    return dataclasses.replace(config, retro=None)


def matched_gpt(config: ModelConfig) -> ModelConfig:
    """The decoder without retrieval, its feed-forward widened until it has the Retro's number of parameters within 1%.

    The count is linear in the width, so two counts give it; it is rounded to a multiple of 8 where the tolerance allows.
    """
    wanted, plain = count_parameters(config), gpt_twin(config)
    base = count_parameters(plain)
    per_column = count_parameters(dataclasses.replace(plain, ffn_dim=plain.ffn_width + 1)) - base
    exact = plain.ffn_width + (wanted - base) / per_column
    for multiple in (FFN_MULTIPLE, 1):
        width = max(1, round(exact / multiple)) * multiple
        if abs(base + (width - plain.ffn_width) * per_column - wanted) <= TOLERANCE * wanted:
            return dataclasses.replace(plain, ffn_dim=width)
    raise UserError(
        f"no feed-forward width gives a GPT within {TOLERANCE:.0%} of the Retro's {wanted:,} parameters; "
        "leave 'gpt_matched' out of TrainConfig.baselines"
    )
