"""Prompts from a file: one a line, as plain text or as JSON objects."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from retro_jax.corpus.text_files import read_json_lines, suffix_of
from retro_jax.errors import UserError
from retro_jax.generation.prompt import Prompt

FROM_STDIN = "-"
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
FIELDS = ("prompt", "passages", "seed")


def read_prompts(given: str) -> list[Prompt]:
    """The prompts of a file, or of standard input for "-". In JSON lines, plain or compressed, each is an object with ``prompt``
    and perhaps ``passages`` (a list of texts) and ``seed``; in others each line is a prompt. Empty lines are left out.

    Raises:
        UserError: there is no such file, no prompt in it, or a line is wrong.
    """
    if given == FROM_STDIN:
        return _some(_from_lines(sys.stdin), "standard input")
    path = Path(given)
    if not path.is_file():
        raise UserError(f"--prompts {given} is not a file; give one, or - for standard input")
    if suffix_of(path) in JSON_LINES:
        return _some((_from_json(fields, where) for where, fields in read_json_lines(path)), given)
    try:
        with open(path, encoding="utf-8") as lines:
            return _some(_from_lines(lines), given)
    except UnicodeDecodeError:
        raise UserError(f"--prompts {given} is not UTF-8 text; convert it") from None


def _some(found: Iterable[Prompt], name: str) -> list[Prompt]:
    prompts = list(found)
    if not prompts:
        raise UserError(f"{name} has no prompt; give one a line")
    return prompts


def _from_lines(lines: Iterable[str]) -> Iterator[Prompt]:
    return (Prompt(text=line.rstrip("\n")) for line in lines if line.strip())


def _from_json(given: object, where: str) -> Prompt:
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
