"""Settings of generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from retro_jax.config.checks import check, check_choice, check_positive

RetrievalMode = Literal["live", "given", "none"]
GridMode = Literal["kept", "rechunked"]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How text is completed.

    A token is drawn after, in this order: ``repetition_penalty`` (CTRL: positive logits of tokens that stand in prompt or
    completion are divided by it, negative ones multiplied), ``temperature`` (0: the most probable token, nothing is drawn),
    ``top_k`` (0: all) and ``top_p`` (the most probable tokens that have this share together; 1: all). ``stop``: a completion
    ends before the first of these strings. ``end_of_document`` "never": the model is kept from ending before ``max_new_tokens``.

    ``retrieval``: what the encoder reads. "live": the neighbours that the run's database has for each chunk of the prompt, and
    for each that fills while text is written. "given": the passages of each prompt. "none": nothing. A model without retrieval
    reads nothing in any case. ``retrieval_step``: neighbours are looked for anew after so many new tokens, with the last
    chunk_len tokens as the query; None: chunk_len.

    ``grid`` "kept": chunks end where the prompt ends, and neighbours serve the tokens from their arrival on, so that nothing is
    computed twice. "rechunked", the papers' way: every ``retrieval_step`` tokens the grid is laid anew from the end of the text,
    all neighbours are looked for again, and every token recomputes the whole row: slow, for comparison.

    ``batch_size`` prompts are completed together, and ``in_flight`` such groups in turn, so that one decodes while another's
    neighbours are searched. ``burst`` tokens are decoded before text is looked at and shown.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    end_of_document: Literal["stop", "never"] = "stop"
    retrieval: RetrievalMode = "live"
    retrieval_step: int | None = None
    grid: GridMode = "kept"
    batch_size: int = 8
    in_flight: int = 2
    burst: int = 8

    def __post_init__(self) -> None:
        check_positive(self, "max_new_tokens", "repetition_penalty", "batch_size", "in_flight", "burst")
        check_choice(self, "end_of_document", ("stop", "never"))
        check_choice(self, "retrieval", get_args(RetrievalMode))
        check_choice(self, "grid", get_args(GridMode))
        check(self.temperature >= 0.0, f"GenerateConfig.temperature={self.temperature} must not be negative; 0 is greedy")
        check(self.top_k >= 0, f"GenerateConfig.top_k={self.top_k} must not be negative; 0 keeps all tokens")
        check(0.0 < self.top_p <= 1.0, f"GenerateConfig.top_p={self.top_p} must be above 0 and at most 1")
        check(all(self.stop), f"GenerateConfig.stop={self.stop} holds an empty string, which ends every text; leave it out")
        if self.retrieval_step is not None:
            check_positive(self, "retrieval_step")
