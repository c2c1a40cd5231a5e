"""Settings of question answering and of text quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from retro_jax.config.checks import check, check_choice, check_positive

QaMode = Literal["closed", "rag", "retro", "retro++"]


@dataclass(frozen=True, kw_only=True)
class QaConfig:
    """Question answering, zero-shot and greedy, for ``eval.py --task qa``.

    ``questions`` are files of JSON lines (:func:`retro_jax.evaluation.questions.read_questions` says which shapes). ``modes``:
    "closed" asks the question alone; "rag" with ``num_passages`` passages in the prompt; "retro" gives them to the encoder;
    "retro++" puts the best into the prompt and gives the rest to the encoder. A GPT answers in the first two. ``evidence``: the
    passages are "given" by the questions' file, or by ``passages``, a file that has those it names by id; or "retrieved" from the
    run's database by the question.

    ``template`` is one of ``templates``, a TOML file; None: the package's, with papers, instruct, instruct_long and plain.
    ``max_prompt_tokens``: passages in a prompt are cut until it has no more; None: what DataConfig.seq_len leaves beside
    ``max_new_tokens``. ``max_questions``: the first of each file; None: all.
    """

    questions: tuple[str, ...] = ()
    passages: str | None = None
    modes: tuple[QaMode, ...] = ("closed", "rag", "retro", "retro++")
    evidence: Literal["given", "retrieved"] = "given"
    num_passages: int = 5
    template: str = "plain"
    templates: str | None = None
    max_new_tokens: int = 32
    max_prompt_tokens: int | None = None
    max_questions: int | None = None
    batch_size: int = 8
    bootstrap_samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check(bool(self.modes), "QaConfig.modes is empty; name closed, rag, retro or retro++")
        for mode in self.modes:
            check(mode in get_args(QaMode), f"QaConfig.modes names {mode!r}; choose from {', '.join(get_args(QaMode))}")
        check_choice(self, "evidence", ("given", "retrieved"))
        check_positive(self, "num_passages", "max_new_tokens", "batch_size", "bootstrap_samples")
        for name in ("max_prompt_tokens", "max_questions"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check(self.seed >= 0, f"QaConfig.seed={self.seed} must not be negative")


@dataclass(frozen=True, kw_only=True)
class TextQualityConfig:
    """Repetition, Self-BLEU and Zipf coefficient of sampled texts, for ``eval.py --task text-quality``.

    The defaults are those of Wang et al. (2023), "Shall We Pretrain Autoregressive Language Models with Retrieval?": 5,000
    prompts, nucleus sampling with 0.9, up to 200 tokens, neighbours for each chunk. A prompt is the first ``prompt_tokens``
    tokens of a document of ``split``, or of a text of ``prompts``, a file that is read as a source of the corpus is. Self-BLEU is
    that of ``self_bleu_texts`` of the texts against all others, with n-grams up to ``self_bleu_longest``.
    """

    prompts: str | None = None
    split: Literal["valid", "test"] = "test"
    num_prompts: int = 5000
    prompt_tokens: int = 40
    max_new_tokens: int = 200
    top_p: float = 0.9
    temperature: float = 1.0
    self_bleu_texts: int = 1000
    self_bleu_longest: int = 4
    zipf_ranks: int = 5000
    batch_size: int = 8
    bootstrap_samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "split", ("valid", "test"))
        check_positive(
            self, "num_prompts", "prompt_tokens", "max_new_tokens", "self_bleu_texts", "self_bleu_longest", "zipf_ranks"
        )
        check_positive(self, "temperature", "batch_size", "bootstrap_samples")
        check(0.0 < self.top_p <= 1.0, f"TextQualityConfig.top_p={self.top_p} must be above 0 and at most 1")
        check(self.seed >= 0, f"TextQualityConfig.seed={self.seed} must not be negative")
