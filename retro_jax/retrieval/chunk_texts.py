"""The text of chunks, alone or as it is found, read where it is needed: a handle that a worker process opens once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_jax.artefact import open_artefact
from retro_jax.config import SPLITS, Context, Split
from retro_jax.corpus.chunk_table import CHUNKS, ChunkTable, open_chunk_tables
from retro_jax.corpus.document_names import DocumentNames
from retro_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from retro_jax.corpus.tokenizer_stage import TOKENIZER


@dataclass(frozen=True)
class ChunkTexts:
    """The chunks of ``data_dir``, by split. It holds names only, so that it travels to other processes; tables and tokenizer
    are opened there when first used. The fingerprints tell one corpus in the same folder from another. ``context``: what the
    text of a chunk that is to be found has before it, as :class:`retro_jax.config.RetrievalConfig` has it."""

    data_dir: Path
    chunks_fingerprint: str
    tokenizer_fingerprint: str
    context: Context = "none"

    @classmethod
    def of(cls, data_dir: Path, context: Context = "none") -> ChunkTexts:
        """The chunks that stand in ``data_dir`` now."""
        chunks, tokenizer = (open_artefact(Path(data_dir) / kind, kind) for kind in (CHUNKS, TOKENIZER))
        return cls(Path(data_dir), chunks.fingerprint, tokenizer.fingerprint, context)

    @property
    def inputs(self) -> dict[str, str]:
        """What an artefact made from the texts records."""
        of = {"context": self.context} if self.context != "none" else {}
        return {CHUNKS: self.chunks_fingerprint, TOKENIZER: self.tokenizer_fingerprint, **of}

    def table(self, split: Split) -> ChunkTable:
        """The chunk table of one split."""
        return _opened_tables(self)[split]

    def read(self, split: Split, chunk_ids_N: np.ndarray) -> list[str]:
        """The text of each chunk: its own tokens, without the continuation."""
        return self.table(split).texts(chunk_ids_N, _opened_tokenizer(self))

    def read_found(self, split: Split, chunk_ids_N: np.ndarray) -> list[str]:
        """The text of each chunk as it is found: after its document's title and the chunk before it, as ``context`` says."""
        if self.context == "none":
            return self.read(split, chunk_ids_N)
        table, tokenizer = self.table(split), _opened_tokenizer(self)
        first_N = np.array(chunk_ids_N)
        document_N = np.asarray(table.document_N[chunk_ids_N])
        if self.context in ("before", "title_and_before"):
            first_N -= (first_N > 0) & (table.document_N[np.maximum(first_N - 1, 0)] == document_N)
        own_N = np.minimum(table.remaining_N[chunk_ids_N], table.chunk_len) + (chunk_ids_N - first_N) * table.chunk_len
        tokens_NX, _ = table.gather(first_N, 2 * table.chunk_len)
        texts = tokenizer.decode_batch([row[:length] for row, length in zip(tokens_NX, own_N, strict=True)])
        if self.context == "before":
            return texts
        titles = [name.title for name in _opened_names(self, split).read(document_N)]
        return [f"{title}\n{text}" if title else text for title, text in zip(titles, texts, strict=True)]


@functools.lru_cache(maxsize=1)
def _opened_tables(texts: ChunkTexts) -> Mapping[Split, ChunkTable]:
    return open_chunk_tables(texts.data_dir)


@functools.lru_cache(maxsize=1)
def _opened_tokenizer(texts: ChunkTexts) -> Tokenizer:
    return load_tokenizer(texts.data_dir / "tokenizer")


@functools.lru_cache(maxsize=len(SPLITS))
def _opened_names(texts: ChunkTexts, split: Split) -> DocumentNames:
    return DocumentNames(texts.data_dir / "tokens", split)
