"""The chunk grid against a plain loop over documents."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.artefact import build_artefact, open_artefact, remove_artefact
from retro_jax.config import SPLITS, ChunkConfig, CorpusConfig, TokenizerConfig
from retro_jax.corpus import chunk_table
from retro_jax.corpus.chunk_table import ChunkTable, build_chunks, open_chunk_tables
from retro_jax.corpus.split import split_of_text
from retro_jax.corpus.token_stage import build_tokens, store_prefix
from retro_jax.corpus.token_store import TokenStoreWriter
from retro_jax.corpus.tokenizer import load_tokenizer
from retro_jax.corpus.tokenizer_stage import build_tokenizer
from retro_jax.errors import UserError
from tests.corpus.conftest import SENTENCES

EOD = 9
Documents = list[list[int]]


def tokens_artefact(data: Path, sources: list[Documents]) -> None:
    """A ``tokens`` artefact with these stored documents as its training split, and nothing else."""

    def make(folder: Path) -> dict:
        for number, documents in enumerate(sources):
            for split in SPLITS:
                with TokenStoreWriter(store_prefix(folder, number, split), np.dtype(np.uint16)) as writer:
                    for document in documents if split == "train" else []:
                        writer.add(np.array(document, np.uint16), np.array([len(document)]))
        return {"eod": EOD, "sources": [{"name": f"{i}.jsonl"} for i in range(len(sources))]}

    build_artefact(data / "tokens", kind="tokens", settings={"documents": sum(map(len, sources))}, inputs={}, make=make)


def table_of(data: Path, sources: list[Documents], chunk_len: int) -> ChunkTable:
    tokens_artefact(data, sources)
    build_chunks(ChunkConfig(chunk_len=chunk_len, retrieved_len=chunk_len), data)
    return open_chunk_tables(data)["train"]


def texts_of(sources: list[Documents]) -> Documents:
    """Every document without its EOD."""
    return [document[:-1] if document[-1] == EOD else document for documents in sources for document in documents]


TOKENS = st.lists(st.integers(0, 8), max_size=20)
# A stored document has at least one token of text; EOD or not at its end.
DOCUMENT = st.builds(lambda text, first, eod: [first, *text, *([EOD] if eod else [])], TOKENS, st.integers(0, 8), st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(st.lists(DOCUMENT, max_size=6), min_size=1, max_size=3),
    chunk_len=st.integers(1, 7),
    length=st.integers(1, 30),
    eod=st.booleans(),
    cut_documents=st.integers(1, 4),
    data=st.data(),
)
def test_grid_and_gather(
    tmp_path_factory: pytest.TempPathFactory,
    sources: list[Documents],
    chunk_len: int,
    length: int,
    eod: bool,
    cut_documents: int,
    data: st.DataObject,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_table, "CUT_DOCUMENTS", cut_documents)
        table = table_of(tmp_path_factory.mktemp("data"), sources, chunk_len)
    texts = texts_of(sources)
    expected = [(number, at) for number, text in enumerate(texts) for at in range(0, len(text), chunk_len)]
    assert table.num_chunks == len(table) == len(expected)
    assert table.num_documents == len(texts)
    assert table.document_N.tolist() == [number for number, _ in expected]
    assert table.remaining_N.tolist() == [len(texts[number]) - at for number, at in expected]
    counts = [sum(-(-len(text) // chunk_len) for text in texts_of([documents])) for documents in sources]
    assert table.source_chunks.tolist() == [0, *np.cumsum(counts).tolist()]
    assert (table.start_N.dtype, table.remaining_N.dtype, table.document_N.dtype) == (np.int64, np.int32, np.int64)

    ids = np.array(data.draw(st.lists(st.integers(-1, len(expected) - 1), min_size=6, max_size=6))).reshape(2, 3)
    tokens, lengths = table.gather(ids, length, eod=eod)
    assert (tokens.shape, tokens.dtype, lengths.shape, lengths.dtype) == ((2, 3, length), np.int32, (2, 3), np.int32)
    for place in np.ndindex(2, 3):
        number, at = expected[ids[place]] if ids[place] >= 0 else (0, 0)
        wanted = (texts[number][at:] + [EOD] * eod)[:length] if ids[place] >= 0 else []
        assert tokens[place].tolist() == wanted + [0] * (length - len(wanted))
        assert lengths[place] == len(wanted)


SOURCES = [[[1, 2, 3, EOD], [4]], [], [[5, 6, 7, 8, 1, 2, EOD]]]


def test_summary(tmp_path: Path) -> None:
    table_of(tmp_path, SOURCES, 4)
    summary = open_artefact(tmp_path / "chunks", "chunks").summary
    assert summary["eod"] == EOD
    assert summary["splits"]["train"] == {
        "chunks": 4,
        "documents": 3,
        "tokens": 10,
        "padding": 0.375,
        "source_chunks": [0, 2, 2, 4],
        "source_documents": [0, 2, 2, 3],
    }
    assert summary["splits"]["test"]["chunks"] == 0


def test_no_ids_and_empty_splits(tmp_path: Path) -> None:
    table_of(tmp_path, SOURCES, 4)
    tables = open_chunk_tables(tmp_path)
    assert tables["test"].num_chunks == 0
    for table in tables.values():
        tokens, lengths = table.gather(np.zeros((0, 2), np.int64), 5)
        assert (tokens.shape, lengths.shape) == ((0, 2, 5), (0, 2))
        tokens, lengths = table.gather(np.array([-1]), 5, eod=True)
        assert (tokens.tolist(), lengths.tolist()) == ([[0] * 5], [0])


@pytest.mark.parametrize("wrong", [-2, 4])
def test_ids_out_of_range_are_refused(tmp_path: Path, wrong: int) -> None:
    table = table_of(tmp_path, SOURCES, 4)
    with pytest.raises(IndexError, match="not all in -1 to 3"):
        table.gather(np.array([0, wrong]), 4)


def test_a_pickled_table_maps_the_files_again(tmp_path: Path) -> None:
    table = table_of(tmp_path, [[list(range(9)) * 500]], 4)
    data = pickle.dumps(table)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert isinstance(copy.start_N, np.memmap)
    ids = np.arange(100)
    assert np.array_equal(copy.gather(ids, 9)[0], table.gather(ids, 9)[0])


def test_chunks_of_other_tokens_are_refused(tmp_path: Path) -> None:
    table_of(tmp_path, SOURCES, 4)
    remove_artefact(tmp_path / "tokens")
    tokens_artefact(tmp_path, SOURCES[:1])
    with pytest.raises(UserError, match="chunks was cut from other tokens than .*; rebuild it"):
        open_chunk_tables(tmp_path)
    with pytest.raises(UserError, match="chunks was built with input tokens="):
        build_chunks(ChunkConfig(chunk_len=4, retrieved_len=4), tmp_path)


def test_another_chunk_length_is_refused(tmp_path: Path) -> None:
    table_of(tmp_path, SOURCES, 4)
    with pytest.raises(UserError, match="chunks was built with setting chunk_len=4, now chunk_len=2"):
        build_chunks(ChunkConfig(chunk_len=2, retrieved_len=4), tmp_path)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_jax.corpus.token_store.COPY_ITEMS", 4096)
    documents = [[1] * 40] * 4096
    peaks = []
    for copies in (4, 16):
        data = tmp_path / str(copies)
        tokens_artefact(data, [documents * copies])
        tracemalloc.start()
        build_chunks(ChunkConfig(chunk_len=4, retrieved_len=4), data)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Measured: 1.1 MB both times; the larger table is 13 MB.
    assert peaks[1] < 1.1 * peaks[0]


def test_from_text_to_text(tmp_path: Path) -> None:
    """Joined, the texts of a document's chunks are the document; each split holds its own."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    config = CorpusConfig(sources=(str(tmp_path / "a.jsonl"),), valid_fraction=0.1, test_fraction=0.2, workers=1)
    build_tokenizer(TokenizerConfig(vocab_size=400), config, tmp_path / "data")
    build_tokens(config, tmp_path / "data")
    build_chunks(ChunkConfig(chunk_len=8, retrieved_len=16), tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer")
    for split, table in open_chunk_tables(tmp_path / "data").items():
        documents = [""] * table.num_documents
        for number, text in zip(table.document_N, table.texts(np.arange(len(table)), tokenizer), strict=True):
            documents[number] += text
        assert documents == [text for text in SENTENCES if split_of_text(text, "", config) == split]
        ends = np.flatnonzero(table.remaining_N <= 8)
        tokens, lengths = table.gather(ends, 9, eod=True)
        assert (tokens[np.arange(len(ends)), lengths - 1] == tokenizer.eod_id).all()
        first = table.gather(np.flatnonzero(np.diff(table.document_N, prepend=-1)), 1)[0]
        assert (first == tokenizer.bos_id).all()
