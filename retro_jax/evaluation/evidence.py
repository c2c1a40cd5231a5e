"""Passages that a run's database has for questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.evaluation.questions import Passage
from retro_jax.progress import progress_bar
from retro_jax.retrieval.database import Database

QUESTIONS_AT_ONCE = 256


class DatabasePassages:
    """The chunks nearest to a question, each with what follows it in its document and that document's title.

    Args:
        database: to be searched.
        tokenizer: of its chunks.
        length: tokens of a passage, with the continuation.
    """

    def __init__(self, database: Database, tokenizer: Tokenizer, length: int) -> None:
        self._database, self._tokenizer, self._length = database, tokenizer, length

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of what is searched."""
        return self._database.fingerprints

    def find(self, texts: Sequence[str], wanted: int) -> list[tuple[Passage, ...]]:
        """The nearest passages of each text, nearest first; fewer where the database finds fewer."""
        found: list[tuple[Passage, ...]] = []
        with progress_bar("passages", len(texts)) as bar:
            for start in range(0, len(texts), QUESTIONS_AT_ONCE):
                some = list(texts[start : start + QUESTIONS_AT_ONCE])
                ids_QK, _ = self._database.nearest_chunks(some, wanted)
                found += [self._passages(ids_K[ids_K >= 0]) for ids_K in ids_QK]
                bar.advance(len(some))
        return found

    def _passages(self, ids_K: np.ndarray) -> tuple[Passage, ...]:
        table = self._database.table
        tokens_KR, lengths_K = table.gather(ids_K, self._length)
        texts = self._tokenizer.decode_batch([row[:length] for row, length in zip(tokens_KR, lengths_K, strict=True)])
        names = self._database.names.read(np.asarray(table.document_N[ids_K]))
        return tuple(Passage(title=name.title, text=text.strip()) for name, text in zip(names, texts, strict=True))
