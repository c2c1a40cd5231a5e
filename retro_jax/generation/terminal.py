"""Completions on a terminal, in the prompts' order, the text of the first that is not whole as it comes."""

from __future__ import annotations

import unicodedata
from collections import deque
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from retro_jax.generation.prompt import Completion, Prompt
from retro_jax.retrieval.answer import Answer, print_answer

# What was found at one place: the row's tokens up to there, the text that was looked for, its neighbours.
Shown = tuple[int, str, list[Answer]]
HEAD = 100


class Terminal:
    """Writes prompts and completions; several are labelled and stand in their order, so what comes early waits.

    Args:
        prompts: all prompts.
        numbers: those that are completed now, ascending.
        console: takes it all.
    """

    def __init__(self, prompts: Sequence[Prompt], numbers: Sequence[int], console: Console) -> None:
        self._prompts, self._console = prompts, console
        self._left = deque(numbers)
        self._texts: dict[int, str] = dict.fromkeys(numbers, "")
        self._ends: dict[int, tuple[Completion, list[Shown]]] = {}
        self._begun: int | None = None

    def add(self, number: int, piece: str, completion: Completion | None, found: list[Shown]) -> None:
        """A piece of text, and with the last one the completion and the neighbours to show."""
        self._texts[number] += piece
        if completion is not None:
            self._ends[number] = (completion, found)
        while self._left:
            first = self._left[0]
            self._write(first)
            if first not in self._ends:
                return
            self._close(*self._ends.pop(first))
            self._left.popleft()

    def _write(self, number: int) -> None:
        if self._begun != number:
            self._begun = number
            text = self._prompts[number].text
            if len(self._prompts) > 1:
                self._console.rule(
                    Text(f"{number}  {text if len(text) <= HEAD else text[: HEAD - 1] + '…'}", style="bold"), align="left"
                )
            else:
                self._print(text, "dim")
        if self._texts[number]:
            self._print(self._texts[number], "")
            self._texts[number] = ""

    def _close(self, completion: Completion, found: list[Shown]) -> None:
        self._print("\n", "")
        if completion.finish == "length":
            self._print("(as long as was asked)\n", "dim")
        for end, query, answers in found:
            self._console.print(Text(f"neighbours of the text up to token {end}: …{query[-HEAD:].strip()}", style="bold dim"))
            for answer in answers:
                print_answer(answer, self._console)
            if not answers:
                self._print("nothing\n\n", "dim")

    def _print(self, text: str, style: str) -> None:
        # What a model writes may hold escape sequences, which a terminal would obey.
        plain = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
        self._console.print(Text(plain, style=style), end="", soft_wrap=True)
        file: TextIO = self._console.file  # type: ignore[assignment]
        file.flush()
