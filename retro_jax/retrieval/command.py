"""``python -m retro_jax retrieval``: ask the database what it would give for a text, and check what is built."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retro_jax.artefact import open_artefact
from retro_jax.config import Config
from retro_jax.corpus.tokenizer import load_tokenizer
from retro_jax.errors import UserError
from retro_jax.retrieval.database import Database

FROM_STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One neighbour of a text, as a person reads it: how near, from where, and what it says."""

    rank: int
    distance: float
    chunk: int
    source: str
    document: int
    id: str
    title: str
    text: str
    continuation: str


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
    table, tokenizer = database.table, load_tokenizer(data_dir / "tokenizer")
    sources = [source["name"] for source in open_artefact(data_dir / "tokens", "tokens").summary["sources"]]

    def answer(rank: int, chunk: int, distance: float) -> Answer:
        tokens_R, length = table.gather(np.array(chunk), max(retrieved_len, table.chunk_len))
        C, document = table.chunk_len, int(table.document_N[chunk])
        text, continuation = tokenizer.decode_batch([tokens_R[: min(C, length)], tokens_R[C : max(C, length)]])
        name, source = database.names.read(np.array([document]))[0], sources[int(table.sources(np.array(chunk)))]
        return Answer(
            rank=rank,
            distance=distance,
            chunk=chunk,
            source=source,
            document=document,
            id=name.id,
            title=name.title,
            text=text,
            continuation=continuation,
        )

    ids_QK, distances_QK = (array.tolist() for array in database.nearest_chunks(texts, k))
    return [
        [answer(rank, *found) for rank, found in enumerate(zip(ids_K, distances_K, strict=True), 1) if found[0] >= 0]
        for ids_K, distances_K in zip(ids_QK, distances_QK, strict=True)
    ]


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
        where = [answer.source, f"document {answer.document}", *filter(None, (answer.id, answer.title))]
        console.print(
            Text.assemble((f"{answer.rank:>2}  ", "bold"), (f"{answer.distance:.4f}", "cyan"), "  " + " · ".join(where))
        )
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", width=10, style="dim")
        grid.add_column(overflow="fold")
        grid.add_row("chunk", Text(answer.text.strip()))
        grid.add_row("goes on", Text(answer.continuation.strip() or "(the document ends here)", style="dim"))
        console.print(grid)
        console.print()
