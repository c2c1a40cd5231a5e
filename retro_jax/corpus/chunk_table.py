"""The grid: every document cut into chunks from its first token, as a table of where each chunk lies in the token stores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retro_jax.array_files import array_file
from retro_jax.artefact import Artefact, build_artefact, open_artefact
from retro_jax.config import SPLITS, ChunkConfig, Split
from retro_jax.corpus.token_stage import TOKENS, store_prefix
from retro_jax.corpus.token_store import TokenStore
from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.errors import UserError

CHUNKS = "chunks"
# Documents cut at a time: memory does not grow with the corpus.
CUT_DOCUMENTS = 2**12


class ChunkTable:
    """The chunks of one split over all sources, in order of sources and documents, with a look-up of their tokens.

    Attributes:
        chunk_len: tokens of a full chunk (C).
        start_N: int64, offset of the chunk's first token in its source's ``.bin``, in tokens.
        remaining_N: int32, text tokens (EOD not counted) from there to the document's end; the chunk has min(C, remaining).
        document_N: int64, number of its document within the split, over all sources.
        source_chunks: int64 [sources + 1], the first chunk id of each source, and the end.
        num_documents: documents of the split.
        eod_id: the token that ends a document.
        source_names: the sources, as ``CorpusConfig.sources`` names them.
    """

    def __init__(self, data_dir: Path, split: Split) -> None:
        self._data_dir, self._split = Path(data_dir), split
        chunks, tokens = open_artefact(self._data_dir / CHUNKS, CHUNKS), open_artefact(self._data_dir / TOKENS, TOKENS)
        if chunks.manifest["inputs"]["tokens"] != tokens.fingerprint:
            raise UserError(f"{chunks.path} was cut from other tokens than {tokens.path}; rebuild it with `--rebuild {CHUNKS}`")
        facts = chunks.summary["splits"][split]
        self.chunk_len: int = chunks.settings["chunk_len"]
        self.eod_id: int = chunks.summary["eod"]
        self.source_names: list[str] = [source["name"] for source in tokens.summary["sources"]]
        self.num_documents: int = facts["documents"]
        self.start_N = chunks.array(f"{split}.start")
        self.remaining_N = chunks.array(f"{split}.remaining")
        self.document_N = chunks.array(f"{split}.document")
        self.source_chunks = np.array(facts["source_chunks"], np.int64)
        self._tokens = [TokenStore(store_prefix(tokens.path, i, split)).tokens for i in range(len(self.source_chunks) - 1)]

    def __reduce__(self) -> tuple:
        return ChunkTable, (self._data_dir, self._split)  # a copy in another process maps the files again

    @property
    def num_chunks(self) -> int:
        """Number of chunks (N)."""
        return len(self.start_N)

    def __len__(self) -> int:
        return self.num_chunks

    def sources(self, chunk_ids: np.ndarray) -> np.ndarray:
        """The number of each chunk's source, int64 of the shape of ``chunk_ids``, which are at least 0."""
        return np.searchsorted(self.source_chunks, chunk_ids, side="right") - 1

    def describe(self, start: int, stop: int) -> str:
        """The chunks ``start`` to ``stop - 1`` in words, with their documents (as ``document_N`` counts them) and sources."""
        parts = []
        for source, name in enumerate(self.source_names):
            first, end = (int(np.clip(self.source_chunks[source + at], start, stop)) for at in (0, 1))
            if first < end:
                parts.append(f"documents {self.document_N[first]} to {self.document_N[end - 1]} from {name!r}")
        return f"{self._split} chunks {start} to {stop - 1}: {', '.join(parts)}"

    def gather(self, chunk_ids: np.ndarray, length: int, *, eod: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ``length`` tokens of each chunk's document from the chunk's first token on, ending with the document.

        Args:
            chunk_ids: int64 [...]; -1 for none.
            length: tokens wanted; more than ``chunk_len`` goes on into the document's next chunks.
            eod: put the EOD id after the document's last token and count it.

        Returns:
            tokens int32 [..., length], 0 beyond the document's end, and their number, int32 [...] (0 for id -1).

        Raises:
            IndexError: an id is below -1 or not below ``num_chunks``.
        """
        ids = np.asarray(chunk_ids, np.int64)
        flat = ids.reshape(-1)
        if flat.size and not -1 <= flat.min() <= flat.max() < self.num_chunks:
            raise IndexError(f"chunk ids {flat.min()} to {flat.max()} are not all in -1 to {self.num_chunks - 1}")
        tokens = np.zeros((flat.size, length), np.int32)
        remaining = np.zeros(flat.size, np.int64)
        there = np.flatnonzero(flat >= 0)
        if there.size:
            remaining[there] = self.remaining_N[flat[there]]
            sources = self.sources(flat[there])
            for source, stored in enumerate(self._tokens):
                of_source = there[sources == source] if len(self._tokens) > 1 else there
                tokens[of_source] = _windows(stored, self.start_N[flat[of_source]], length)
        at = np.arange(length)
        tokens *= at < remaining[:, None]
        if eod:
            ends = np.flatnonzero((flat >= 0) & (remaining < length))
            tokens[ends, remaining[ends]] = self.eod_id
            remaining[there] += 1
        lengths = np.minimum(remaining, length).astype(np.int32)
        return tokens.reshape(*ids.shape, length), lengths.reshape(ids.shape)

    def texts(self, chunk_ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
        """The text of each chunk (int64 [n]), without its padding."""
        tokens, lengths = self.gather(chunk_ids, self.chunk_len)
        return tokenizer.decode_batch([row[:n] for row, n in zip(tokens, lengths, strict=True)])


def _windows(stored: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """``stored[start : start + length]`` for each start; what lies beyond the store is not specified."""
    if len(stored) < length:
        return np.take(stored, starts[:, None] + np.arange(length), mode="clip")
    windows = np.lib.stride_tricks.sliding_window_view(stored, length)  # one row copy each, not one look-up a token
    rows = windows[np.minimum(starts, len(windows) - 1)]
    late = np.flatnonzero(starts >= len(windows))
    rows[late] = np.take(stored, starts[late, None] + np.arange(length), mode="clip")
    return rows


def open_chunk_tables(data_dir: Path) -> dict[Split, ChunkTable]:
    """The chunk tables of all splits.

    Raises:
        UserError: ``chunks`` or ``tokens`` is not there, or they do not belong together.
    """
    return {split: ChunkTable(data_dir, split) for split in SPLITS}


def build_chunks(config: ChunkConfig, data_dir: Path) -> Artefact:
    """Build or open ``<data_dir>/chunks`` from ``<data_dir>/tokens``.

    Files: per split ``<split>.start.npy``, ``<split>.remaining.npy`` and ``<split>.document.npy``; see :class:`ChunkTable`.
    Summary: ``eod``, and per split chunks, documents, text tokens, ``padding`` (the share of the grid's positions that no
    token fills), the first chunk id and the first document of each source, and their ends.
    """
    data_dir = Path(data_dir)
    tokens = open_artefact(data_dir / TOKENS, TOKENS)
    eod = int(tokens.summary["eod"])

    def make(folder: Path) -> Mapping:
        sources = range(len(tokens.summary["sources"]))
        stores = {split: [TokenStore(store_prefix(tokens.path, i, split)) for i in sources] for split in SPLITS}
        return {
            "eod": eod,
            "splits": {split: _cut_split(folder, split, stores[split], config.chunk_len, eod) for split in SPLITS},
        }

    settings = {"chunk_len": config.chunk_len}
    return build_artefact(data_dir / CHUNKS, kind=CHUNKS, settings=settings, inputs={"tokens": tokens.fingerprint}, make=make)


def _cut_split(folder: Path, split: Split, stores: list[TokenStore], chunk_len: int, eod: int) -> Mapping:
    source_chunks, source_documents, text_tokens = [0], [0], 0
    for store in stores:
        source_chunks.append(source_chunks[-1])
        source_documents.append(source_documents[-1] + store.num_documents)
        for first, last in _parts(store):
            text = _text_lengths(store, first, last, eod)
            source_chunks[-1] += int((-(-text // chunk_len)).sum())
            text_tokens += int(text.sum())
    total = source_chunks[-1]
    with (
        array_file(folder / f"{split}.start.npy", np.int64, (total,)) as add_start,
        array_file(folder / f"{split}.remaining.npy", np.int32, (total,)) as add_remaining,
        array_file(folder / f"{split}.document.npy", np.int64, (total,)) as add_document,
    ):
        for first_document, store in zip(source_documents, stores, strict=False):
            for first, last in _parts(store):
                text = _text_lengths(store, first, last, eod)
                chunks = -(-text // chunk_len)
                offset = (np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * chunk_len
                add_start(np.repeat(store.starts(first, last), chunks) + offset)
                add_remaining(np.repeat(text, chunks) - offset)
                add_document(np.repeat(np.arange(first, last) + first_document, chunks))
    return {
        "chunks": total,
        "documents": source_documents[-1],
        "tokens": text_tokens,
        "padding": round(1.0 - text_tokens / (total * chunk_len), 4) if total else 0.0,
        "source_chunks": source_chunks,
        "source_documents": source_documents,
    }


def _parts(store: TokenStore) -> list[tuple[int, int]]:
    return [(first, min(first + CUT_DOCUMENTS, store.num_documents)) for first in range(0, store.num_documents, CUT_DOCUMENTS)]


def _text_lengths(store: TokenStore, first: int, last: int, eod: int) -> np.ndarray:
    """Tokens of each document without its EOD, int64. Stores of the ``tokens`` artefact have no empty documents."""
    lengths = store.lengths(first, last)
    return lengths - (store.tokens[store.starts(first, last) + lengths - 1] == eod)
