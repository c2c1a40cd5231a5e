"""Tokens to text as they come, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.errors import UserError

# How a decoder spells bytes that are no character, or not yet.
UNFINISHED = "\ufffd"
# The prompt's last tokens, which new text is decoded after: some tokenizers write the first word of a text otherwise.
CONTEXT = 4


class Transcript:
    """The text of a row's new tokens, one token at a time.

    A token may be a part of a character, and a character may wait for the next token; a stop string may begin in one token and
    end in another.

    Attributes:
        text: of the tokens so far, without a character that is not whole, and cut before a stop string.
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(prompt[-CONTEXT:])
        self._settled, self._read = 0, len(self._tokens)
        self.text, self.stopped = "", False

    def add(self, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        self._take(whole=True)

    def finish(self) -> None:
        """No token comes any more: what waits is written as it is."""
        if not self.stopped:
            self._take(whole=False)

    @property
    def shown(self) -> str:
        """The part of the text that no stop string can take back."""
        return self.text[: len(self.text) - (0 if self.stopped else _begun(self.text, self._stop))]

    def _take(self, *, whole: bool) -> None:
        before, after = self._decoded(self._tokens[self._settled : self._read]), self._decoded(self._tokens[self._settled :])
        if len(after) <= len(before) or (whole and after.endswith(UNFINISHED)):
            return
        known = len(self.text)
        self.text += after[len(before) :]
        self._settled, self._read = self._read, len(self._tokens)
        ends = [self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self._stop]
        if found := [end for end in ends if end >= 0]:
            self.text, self.stopped = self.text[: min(found)], True

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode_batch([np.array(tokens, np.int32)])[0] if tokens else ""


def check_stops(stop: tuple[str, ...], tokenizer: Tokenizer) -> None:
    """Refuse stop strings that can never come.

    Raises:
        UserError: one is empty, or the tokenizer has no tokens for it.
    """
    for text in stop:
        if not text:
            raise UserError("a stop string is empty, which ends every text; leave it out of GenerateConfig.stop")
        try:
            tokenizer.encode_batch([text], [f"the stop string {text!r}"])
        except UserError as error:
            reason = str(error).split(";")[0]
            raise UserError(f"{reason}, so it can never come; leave it out of GenerateConfig.stop") from None


def _begun(text: str, stop: tuple[str, ...]) -> int:
    """The length of the longest end of the text that a stop string begins with."""
    longest = max(map(len, stop), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) and len(s) > n for s in stop)), 0)
