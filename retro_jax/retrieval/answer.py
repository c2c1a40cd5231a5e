"""A neighbour as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retro_jax.artefact import open_artefact
from retro_jax.corpus.tokenizer import load_tokenizer
from retro_jax.retrieval.database import Database


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


class AnswerReader:
    """Reads what a search found: chunks with their continuations, ``retrieved_len`` tokens in all, and their documents' names."""

    def __init__(self, database: Database, data_dir: Path, retrieved_len: int) -> None:
        self._database, self._tokenizer = database, load_tokenizer(data_dir / "tokenizer")
        self._retrieved_len = max(retrieved_len, database.table.chunk_len)
        self._sources = [source["name"] for source in open_artefact(data_dir / "tokens", "tokens").summary["sources"]]

    def read(self, chunks: Sequence[int], distances: Sequence[float]) -> list[Answer]:
        """Of one text: training chunks, nearest first, and how near they are; -1 for none."""
        found = zip(chunks, distances, strict=True)
        return [self._read_one(rank, *one) for rank, one in enumerate(found, 1) if one[0] >= 0]

    def _read_one(self, rank: int, chunk: int, distance: float) -> Answer:
        table = self._database.table
        tokens_R, length = table.gather(np.array(chunk), self._retrieved_len)
        C, document = table.chunk_len, int(table.document_N[chunk])
        text, continuation = self._tokenizer.decode_batch([tokens_R[: min(C, length)], tokens_R[C : max(C, length)]])
        name = self._database.names.read(np.array([document]))[0]
        return Answer(
            rank=rank,
            distance=distance,
            chunk=chunk,
            source=self._sources[int(table.sources(np.array(chunk)))],
            document=document,
            id=name.id,
            title=name.title,
            text=text,
            continuation=continuation,
        )


def print_answer(answer: Answer, console: Console) -> None:
    """Where it stands and how near it is, what it says, and how it goes on."""
    where = [answer.source, f"document {answer.document}", *filter(None, (answer.id, answer.title))]
    console.print(Text.assemble((f"{answer.rank:>2}  ", "bold"), (f"{answer.distance:.4f}", "cyan"), "  " + " · ".join(where)))
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", width=10, style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("chunk", Text(answer.text.strip()))
    grid.add_row("goes on", Text(answer.continuation.strip() or "(the document ends here)", style="dim"))
    console.print(grid)
    console.print()
