"""A question as a prompt: closed book, with passages in the prompt (RAG), in the encoder (RETRO), or in both (RETRO++)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retro_jax.config import QaMode
from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.evaluation.questions import Passage, Question
from retro_jax.evaluation.templates import Template
from retro_jax.generation.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Makes prompts of questions.

    Attributes:
        template: how a question and its passages stand in a prompt.
        tokenizer: the model's; a prompt's length is counted with it.
        longest: tokens that a prompt may have. Passages in it are cut at their end until it fits (the last ones go first), as in
            the reference code of InstructRetro.
    """

    template: Template
    tokenizer: Tokenizer
    longest: int

    def prompt(self, question: Question, passages: Sequence[Passage], mode: QaMode, seed: int) -> Prompt:
        """The prompt of a question in a mode; ``passages`` best first.

        Raises:
            UserError: the question alone is longer than a prompt may be.
        """
        shown = [self._passage(passage) for passage in passages]
        beside = {"closed": 0, "retro": 0, "retro++": 1, "rag": len(shown)}[mode]
        encoded = tuple(shown[beside:]) if mode in ("retro", "retro++") else ()
        text = self._text(question, self._cut(question, self.template.separator.join(shown[:beside])))
        return Prompt(text=text, passages=encoded, seed=seed)

    def _passage(self, passage: Passage) -> str:
        return self.template.passage.format(title=passage.title, text=passage.text).strip("\n")

    def _text(self, question: Question, passages: str) -> str:
        if question.asked:
            return self.template.separator.join(filter(None, (passages, question.text)))
        if not passages:
            return self.template.question.format(question=question.text)
        return self.template.with_passages.format(passages=passages, question=question.text)

    def _cut(self, question: Question, passages: str) -> str:
        """The passages, as much of them as fits."""
        tokens = self._tokens(passages)
        taken, text = len(tokens), passages
        # Text that is cut is not always cut into the same tokens, so it is counted again.
        while (over := len(self._tokens(self._text(question, text))) - self.longest) > 0:
            if not taken:
                raise UserError(
                    f"the question {question.id} has {over} tokens more than the {self.longest} that a prompt may have; "
                    "raise QaConfig.max_prompt_tokens, lower QaConfig.max_new_tokens, or leave it out"
                )
            taken = max(0, taken - over)
            text = self.tokenizer.decode_batch([tokens[:taken]])[0].rstrip("\ufffd") if taken else ""
        return text

    def _tokens(self, text: str) -> np.ndarray:
        return self.tokenizer.encode_batch([text])[0]
