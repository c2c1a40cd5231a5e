"""Text from tokens as they come: characters in several tokens, stop strings across tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.errors import BadInput, UserError
from retro_jax.generation.stopping import Transcript, check_stops


class Bytes(Tokenizer):
    """A token a byte; 256 and 257 are BOS and the end, and 258 on some longer pieces."""

    PIECES = (b"END", b"of te", b"xt", "né".encode())

    def __init__(self) -> None:
        self.vocab_size, self.bos_id, self.eod_id = 258 + len(self.PIECES), 256, 257

    def encode_batch(self, texts: Sequence[str], where: Sequence[str] | None = None) -> list[np.ndarray]:
        if any("\x00" in text for text in texts):
            raise BadInput(f"the tokenizer has no token for '\\x00' in {where[0] if where else 'a text'}; take another")
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode_batch(self, ids: Sequence[np.ndarray]) -> list[str]:
        pieces = [[bytes([t]) if t < 256 else self.PIECES[t - 258] for t in row] for row in self._drop_specials(ids)]
        return [b"".join(row).decode(errors="replace") for row in pieces]

    def token_bytes(self) -> np.ndarray:
        raise NotImplementedError

    def token(self, number: int) -> str:
        return str(number)


def transcript(stop: tuple[str, ...] = (), prompt: bytes = b"prompt") -> Transcript:
    return Transcript(Bytes(), list(prompt), stop)


def test_a_character_waits_until_it_is_whole() -> None:
    row, texts = transcript(), []
    for token in "aé€😀b".encode():
        row.add(token)
        texts.append(row.text)
    assert texts == ["a", "a", "aé", "aé", "aé", "aé€", "aé€", "aé€", "aé€", "aé€😀", "aé€😀b"]


def test_bytes_that_never_become_a_character_are_written_as_such() -> None:
    row = transcript()
    for token in b"a\xe2\x82":
        row.add(token)
    assert row.text == "a"
    row.finish()
    assert row.text == "a\ufffd"
    row = transcript()
    for token in b"\xff\xfeb":
        row.add(token)
    assert row.text == "\ufffd\ufffdb"


def test_a_prompt_that_ends_in_a_long_character() -> None:
    row = transcript(prompt="a😀".encode())
    for token in "😀é".encode():
        row.add(token)
    assert row.text == "😀é"


@pytest.mark.parametrize(
    ("tokens", "stop", "text"),
    [
        (b"one\n\ntwo", ("\n\n",), "one"),
        ([*b"the ", 259, 260, *b"x"], ("of text",), "the "),  # begins in one token, ends in another
        ([*b"a", 259, 260, *b" b"], ("text b",), "aof "),
        ([*b"x", 258, *b"y"], ("ND", "E"), "x"),  # both in one token: the earlier one
        ([*b"w", 261, *b"e"], ("é",), "wn"),
        ("aé".encode(), ("é",), "a"),
        (b"aaab", ("aab",), "a"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(tokens: Sequence[int], stop: tuple[str, ...], text: str) -> None:
    row, shown = transcript(stop), ""
    for token in tokens:
        row.add(token)
        assert row.shown.startswith(shown)  # nothing that was shown is taken back
        shown = row.shown
        if row.stopped:
            break
    assert row.stopped and row.text == row.shown == text


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    row, shown = transcript(("\n\nQ:", "a\n\n\n")), []
    for token in b"a\n\nQa":
        row.add(token)
        shown.append(row.shown)
    assert shown == ["", "", "", "a", "a\n\nQ"]  # "a\n\n" may go on to either; "\n\nQ" still to the first
    row.finish()
    assert row.text == "a\n\nQa" and not row.stopped


def test_stop_strings_that_never_come() -> None:
    check_stops(("\n", "Question:"), Bytes())
    with pytest.raises(UserError, match="is empty, which ends every text"):
        check_stops(("",), Bytes())
    with pytest.raises(UserError, match="no token for .* in the stop string 'a.x00', so it can never come"):
        check_stops(("a\x00",), Bytes())
