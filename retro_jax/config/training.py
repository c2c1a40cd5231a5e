"""Settings of training and of evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from retro_jax.config.checks import check, check_choice, check_fraction, check_positive

Baseline = Literal["gpt", "gpt_matched"]
Trained = Literal["all", "retrieval"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, warm-up, and a cosine or constant schedule. ``decay_mask``: which parameters
    decay ("matrices": all but biases and 1-D weights, as Megatron; "all"). ``clip_norm`` 0 turns clipping off."""

    learning_rate: float = 3e-4
    min_learning_rate: float = 3e-5
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_mask: Literal["matrices", "all"] = "matrices"
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "eps")
        check_choice(self, "schedule", ("cosine", "constant"))
        check_choice(self, "decay_mask", ("matrices", "all"))
        check_fraction(self, "beta1", "beta2")
        for name in ("min_learning_rate", "warmup_steps", "weight_decay", "clip_norm"):
            check(getattr(self, name) >= 0, f"OptimizerConfig.{name}={getattr(self, name)} must not be negative")
        check(
            self.min_learning_rate <= self.learning_rate,
            f"OptimizerConfig.min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and with what care to train. ``baselines`` are trained after the model on identical rows: "gpt" is the model
    without retrieval, "gpt_matched" the same with a wider feed-forward until it has as many parameters as the Retro.
    ``precision`` "auto": bfloat16 compute on accelerators, float32 on CPU; master weights are float32.
    ``loss_chunk`` tokens' logits exist at a time. ``z_loss`` times the square of each token's logsumexp is added to what is
    minimised, so that logits do not drift (PaLM: 1e-4); losses are reported without it. ``keep`` latest checkpoints are kept,
    and the best by validation loss.

    ``start_from``: the first step takes its parameters from this checkpoint: a trained model's folder
    (``runs/<config>/models/<name>``, or one step of it, ``.../checkpoints/<step>``), or a folder in the format "retro" or
    "huggingface" of ``python -m retro_jax convert``. Where it is a GPT and the model a Retro, ``new_parts`` says how chunked
    cross-attention and encoder start: "no_op" adds exactly 0 at first (the output projection is 0, or a learned gate),
    "initialised" starts as without a checkpoint (InstructRetro). ``trained`` "retrieval" trains these parts alone.

    ``neighbour_capacity``: the share of the chunks that a device computes at a time whose neighbours are encoded. Below 1 those
    of the others, which no token reads, are left out of the step; a batch in which more are read ends the run. "auto" is chosen
    at the start from the training rows.
    """

    steps: int = 1000
    baselines: tuple[Baseline, ...] = ()
    accumulate: int = 1
    seed: int = 0
    start_from: str | None = None
    new_parts: Literal["no_op", "initialised"] = "no_op"
    trained: Trained = "all"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    loss_chunk: int = 2048
    z_loss: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 200
    keep: int = 2
    valid_every: int = 200
    valid_batches: int = 8
    neighbour_capacity: float | Literal["auto"] = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "steps", "accumulate", "loss_chunk", "log_every", "checkpoint_every", "keep")
        check_choice(self, "precision", ("auto", "float32", "bfloat16"))
        check_choice(self, "new_parts", ("no_op", "initialised"))
        check_choice(self, "trained", get_args(Trained))
        if self.start_from is None:
            check(
                self.trained == "all",
                "TrainConfig.trained='retrieval' freezes an untrained decoder; set start_from",
            )
        else:
            check(
                "gpt_matched" not in self.baselines,
                "TrainConfig.baselines names 'gpt_matched', whose feed-forward is wider than that of start_from; leave it out",
            )
        check(
            self.trained == "all" or not self.baselines,
            "TrainConfig.baselines have no retrieval, so trained='retrieval' leaves nothing of them to train; set baselines=()",
        )
        for baseline in self.baselines:
            check(
                baseline in get_args(Baseline),
                f"TrainConfig.baselines names {baseline!r}; choose from {', '.join(get_args(Baseline))}",
            )
        check(0.0 <= self.z_loss < float("inf"), f"TrainConfig.z_loss={self.z_loss} must be finite and not negative")
        if self.neighbour_capacity != "auto":
            check(
                0.0 < self.neighbour_capacity <= 1.0,
                f"TrainConfig.neighbour_capacity={self.neighbour_capacity} must be above 0 and at most 1, or 'auto'",
            )
        for name in ("valid_every", "valid_batches"):
            check(getattr(self, name) >= 0, f"TrainConfig.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on whole held-out documents: windows of ``window`` tokens, moved by ``stride``; every token is scored once,
    with the context of the window in which it is first seen. Both are multiples of the chunk length.

    ``questions`` are for ``eval.py --task retrieval``: files of JSON lines, each with a ``question`` and ``gold_passage_ids``,
    ids of training documents (the field ``id`` of their source).
    """

    split: Literal["valid", "test"] = "test"
    window: int = 512
    stride: int = 256
    batch_size: int = 8
    max_documents: int | None = None
    overlap_neighbours: int = 10
    bootstrap_samples: int = 1000
    questions: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "split", ("valid", "test"))
        check_positive(self, "window", "stride", "batch_size", "overlap_neighbours", "bootstrap_samples")
        check(self.seed >= 0, f"EvalConfig.seed={self.seed} must not be negative")
        check(
            self.stride <= self.window, f"EvalConfig.stride={self.stride} is above window={self.window}: tokens would be left out"
        )
        if self.max_documents is not None:
            check_positive(self, "max_documents")
