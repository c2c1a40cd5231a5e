"""Prompts from a file: one a line, as plain text or as JSON objects."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from retro_jax.errors import UserError
from retro_jax.generation.prompt import Prompt

FROM_STDIN = "-"
FIELDS = ("prompt", "passages", "seed")


def read_prompts(given: str) -> list[Prompt]:
    """The prompts of a file, or of standard input for "-". In files that end in ``.jsonl`` each line is an object with ``prompt``
    and perhaps ``passages`` (a list of texts) and ``seed``; in others each line is a prompt. Empty lines are left out.

    Raises:
        UserError: there is no such file, no prompt in it, or a line is wrong.
    """
    if given == FROM_STDIN:
        return _read(sys.stdin, "standard input", as_json=False)
    path = Path(given)
    if not path.is_file():
        raise UserError(f"--prompts {given} is not a file; give one, or - for standard input")
    try:
        with open(path, encoding="utf-8") as lines:
            return _read(lines, given, as_json=path.suffix == ".jsonl")
    except UnicodeDecodeError:
        raise UserError(f"--prompts {given} is not UTF-8 text; convert it") from None


def _read(lines: Iterable[str], name: str, *, as_json: bool) -> list[Prompt]:
    numbered = ((number, line.rstrip("\n")) for number, line in enumerate(lines, 1) if line.strip())
    prompts = [_from_json(line, f"{name} line {number}") if as_json else Prompt(text=line) for number, line in numbered]
    if not prompts:
        raise UserError(f"{name} has no prompt; give one a line")
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); give an object with the field prompt") from None
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise UserError(f"{where} is not an object with a text in the field prompt")
    passages, seed = given.get("passages"), given.get("seed", 0)
    if passages is not None and not (isinstance(passages, list) and all(isinstance(text, str) for text in passages)):
        raise UserError(f"{where} has passages that are not a list of texts")
    if type(seed) is not int:
        raise UserError(f"{where} has seed {seed!r}, which is not an integer")
    if unknown := sorted(given.keys() - set(FIELDS)):
        raise UserError(f"{where} has the field {unknown[0]!r}; known are {', '.join(FIELDS)}")
    return Prompt(text=given["prompt"], passages=None if passages is None else tuple(passages), seed=seed)
