"""``python -m retro_jax retrieval``: ask the database what it would give for a text, and check what is built."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from retro_jax.config import Config
from retro_jax.errors import UserError
from retro_jax.retrieval.answer import Answer, AnswerReader, print_answer
from retro_jax.retrieval.database import Database

FROM_STDIN = "-"


def query(config: Config, data_dir: Path, arguments: argparse.Namespace, console: Console) -> None:
    """Print the nearest training chunks of each text.

    Args:
        config: tells how long a neighbour is with its continuation.
        data_dir: holds the artefacts up to ``index``.
        arguments: ``text``, ``k`` and ``json``.
        console: takes the answers; with ``json`` standard output does, one object a text.

    Raises:
        UserError: there is no text, or ``k`` is not positive; or the database is not built.
    """
    if arguments.k < 1:
        raise UserError(f"--k {arguments.k} must be at least 1")
    texts = _texts(arguments.text)
    database = Database(data_dir)
    for text, found in zip(texts, answers(database, data_dir, texts, arguments.k, config.chunks.retrieved_len), strict=True):
        if arguments.json:
            print(json.dumps({"text": text, "neighbours": [asdict(answer) for answer in found]}, ensure_ascii=False))
        else:
            _print(text, found, console)


def check(config: Config, data_dir: Path, arguments: argparse.Namespace) -> None:
    """Compute some of the stored blocks anew and compare them.

    Args:
        config: the run's settings.
        data_dir: holds the artefacts.
        arguments: ``fraction`` and ``seed``.

    Raises:
        UserError: something differs.
    """
    from retro_jax.retrieval.check import check_blocks

    differing = check_blocks(config, data_dir, arguments.fraction, arguments.seed, print)
    if differing:
        raise UserError(
            f"{len(differing)} of the blocks computed anew differ from what is stored, first {differing[0]}; rebuild it with "
            "`python -m retro_jax prepare --config FILE --rebuild STAGE`"
        )


def answers(database: Database, data_dir: Path, texts: list[str], k: int, retrieved_len: int) -> list[list[Answer]]:
    """For each text its nearest chunks with their continuations, ``retrieved_len`` tokens in all."""
    reader = AnswerReader(database, data_dir, retrieved_len)
    return [reader.read(*found) for found in zip(*(array.tolist() for array in database.nearest_chunks(texts, k)), strict=True)]


def _texts(given: Sequence[str]) -> list[str]:
    texts: list[str] = []
    for text in given:
        texts += [line.rstrip("\n") for line in sys.stdin if line.strip()] if text == FROM_STDIN else [text]
    if not texts or not all(text.strip() for text in texts):
        raise UserError("a text to search for is empty; give one or more, or - with a text in each line of standard input")
    return texts


def _print(text: str, found: list[Answer], console: Console) -> None:
    console.rule(Text(text if len(text) <= 100 else text[:99] + "…", style="bold"), align="left")
    if not found:
        console.print("nothing: the embedder finds nothing in this text that stands in the database too")
    for answer in found:
        print_answer(answer, console)
