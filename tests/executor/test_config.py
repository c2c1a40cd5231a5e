"""The executor's settings: what is refused, and that they decide nothing but who computes."""

from __future__ import annotations

import pytest

from retro_jax.config import Config, CorpusConfig, ExecutorConfig, RetrievalConfig
from retro_jax.gin_config import load_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "slurm"}, "ExecutorConfig.kind='slurm'"),
        ({"attempts": 0}, "ExecutorConfig.attempts=0"),
        ({"address": ""}, "ExecutorConfig.address is empty"),
        ({"kind": "ray", "gpus": -1.0}, "ExecutorConfig.gpus=-1.0 must not be negative"),
        ({"kind": "ray", "gpus": 1.5}, "gpus=1.5 is neither whole nor a share of one GPU; use 2"),
        ({"gpus": 1.0}, "gpus=1.0 asks Ray for GPUs, but kind='local'"),
    ],
)
def test_wrong_settings_are_told(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExecutorConfig(**settings)


def test_one_setting_reaches_all_stages() -> None:
    config = load_config([], ["ExecutorConfig.kind=ray", "ExecutorConfig.gpus=0.5"])
    assert config.corpus.executor == config.retrieval.executor == ExecutorConfig(kind="ray", gpus=0.5)


def test_two_executors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"CorpusConfig.executor=.* and RetrievalConfig.executor=.* differ"):
        Config(corpus=CorpusConfig(executor=ExecutorConfig(kind="ray")), retrieval=RetrievalConfig())
