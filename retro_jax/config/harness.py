"""Settings of the evaluation by EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from retro_jax.config.checks import check, check_positive
from retro_jax.config.generation import RetrievalMode


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """``python eval.py --task harness`` (extra ``harness``).

    ``tasks``: files or folders of JSON lines (:mod:`retro_jax.evaluation.harness_tasks` tells their shapes), task files of
    lm_eval (``.yaml``), and names of lm_eval's own tasks, whose data it downloads. ``retrieval``: what a model with retrieval
    reads, each a column of the result: "live" the nearest training chunks of its row's chunks, "given" the texts in the field
    ``passages`` of each document, "none". ``fewshot`` examples stand before each question, drawn by ``seed``; None: as the task
    says, of local files none. ``limit``: so many documents of each task; None: all. Rows longer than ``max_tokens`` lose tokens
    at the left; None: ``DataConfig.seq_len``. A task that does not say how much is generated gets ``max_new_tokens``.
    ``bootstrap_samples``: for the standard errors of what is no mean.
    """

    tasks: tuple[str, ...] = ()
    retrieval: tuple[RetrievalMode, ...] = ("live", "none")
    fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 16
    max_tokens: int | None = None
    max_new_tokens: int = 256
    bootstrap_samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "max_new_tokens", "bootstrap_samples")
        for name in ("limit", "max_tokens"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        for name in ("fewshot", "seed"):
            check((getattr(self, name) or 0) >= 0, f"HarnessConfig.{name}={getattr(self, name)} must not be negative")
        modes = get_args(RetrievalMode)
        check(
            len(self.retrieval) > 0 and all(mode in modes for mode in self.retrieval),
            f"HarnessConfig.retrieval={self.retrieval} must name one or more of {', '.join(modes)}",
        )
        for name in ("retrieval", "tasks"):
            values = getattr(self, name)
            check(len(set(values)) == len(values), f"HarnessConfig.{name}={values} names something twice; name it once")
