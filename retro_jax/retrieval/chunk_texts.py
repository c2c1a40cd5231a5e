"""The text of chunks, read where it is needed: a handle that a worker process opens once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_jax.artefact import open_artefact
from retro_jax.config import Split
from retro_jax.corpus.chunk_table import CHUNKS, ChunkTable, open_chunk_tables
from retro_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from retro_jax.corpus.tokenizer_stage import TOKENIZER


@dataclass(frozen=True)
class ChunkTexts:
    """The chunks of ``data_dir``, by split. It holds names only, so that it travels to other processes; tables and tokenizer
    are opened there when first used. The fingerprints tell one corpus in the same folder from another."""

    data_dir: Path
    chunks_fingerprint: str
    tokenizer_fingerprint: str

    @classmethod
    def of(cls, data_dir: Path) -> ChunkTexts:
        """The chunks that stand in ``data_dir`` now."""
        chunks, tokenizer = (open_artefact(Path(data_dir) / kind, kind) for kind in (CHUNKS, TOKENIZER))
        return cls(Path(data_dir), chunks.fingerprint, tokenizer.fingerprint)

    @property
    def inputs(self) -> dict[str, str]:
        """What an artefact made from the texts records."""
        return {CHUNKS: self.chunks_fingerprint, TOKENIZER: self.tokenizer_fingerprint}

    def table(self, split: Split) -> ChunkTable:
        """The chunk table of one split."""
        return _opened_tables(self)[split]

    def read(self, split: Split, chunk_ids_N: np.ndarray) -> list[str]:
        """The text of each chunk: its own tokens, without the continuation."""
        return self.table(split).texts(chunk_ids_N, _opened_tokenizer(self))


@functools.lru_cache(maxsize=1)
def _opened_tables(texts: ChunkTexts) -> Mapping[Split, ChunkTable]:
    return open_chunk_tables(texts.data_dir)


@functools.lru_cache(maxsize=1)
def _opened_tokenizer(texts: ChunkTexts) -> Tokenizer:
    return load_tokenizer(texts.data_dir / "tokenizer")
