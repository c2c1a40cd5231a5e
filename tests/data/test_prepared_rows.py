"""Rows of a corpus that went through all data stages."""

import json

import numpy as np
import pytest

from retro_jax.config import ChunkConfig, Config, CorpusConfig, ModelConfig, RetrievalConfig, RetroConfig, TokenizerConfig
from retro_jax.data.held_out import held_out_batches, held_out_rows, shuffled_donors
from retro_jax.data.reader import RowReader
from retro_jax.data.training_rows import describe_rows, training_rows
from retro_jax.prepare import prepare
from retro_jax.retrieval.neighbour_table import KEEP_ALL, NeighbourFilter

C, WORDS = 16, [a + b for a in ("tor", "mel", "ka", "vish", "on") for b in ("a", "eth", "ily", "o", "und", "is")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(3, 120))) for _ in range(120)]
    files = [folder / "many.jsonl", folder / "few.jsonl"]
    for file, of_file in zip(files, (texts[:80], texts[80:]), strict=True):
        file.write_text("\n".join(json.dumps({"text": text}) for text in of_file))
    chunks = ChunkConfig(chunk_len=C, num_neighbours=3, retrieved_len=2 * C)
    config = Config(
        corpus=CorpusConfig(sources=tuple(map(str, files)), workers=1, valid_fraction=0.1, test_fraction=0.2),
        tokenizer=TokenizerConfig(vocab_size=512),
        chunks=chunks,
        retrieval=RetrievalConfig(features=2**12, workers=1),
        model=ModelConfig(retro=RetroConfig(chunks=chunks)),
    )
    return texts, chunks, prepare(config, folder / "data", report=lambda line: None)


def reader(corpus, split, **settings):
    _, chunks, data = corpus
    return RowReader(
        queries=data.tables[split], database=data.tables["train"], neighbours=data.neighbours[split], chunks=chunks, **settings
    )


def text_of(corpus, tokens):
    return corpus[2].tokenizer.decode_batch([np.asarray(tokens)])[0]


def test_all_training_text_and_nothing_else_stands_in_the_rows(corpus):
    table = corpus[2].tables["train"]
    rows = training_rows(table, 6 * C, weights=None)
    batch = reader(corpus, "train").read(rows.chunk_ids(np.arange(len(rows))))
    facts = describe_rows(rows, reader(corpus, "train"))
    assert facts["text_tokens"] == (batch.segments > 0).sum() == batch.loss_mask.sum()
    assert facts["padding_share"] == pytest.approx((batch.segments == 0).mean())
    eod = corpus[2].tokenizer.eod_id
    assert (batch.targets == eod).sum() == table.num_documents and not (batch.tokens == eod).any()
    first = np.flatnonzero(np.diff(table.document_N, prepend=-1))
    tokens, lengths = table.gather(first, int(table.remaining_N.max()))
    stored = [text_of(corpus, row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    assert set(stored) <= set(corpus[0])
    assert text_of(corpus, batch.tokens[batch.segments > 0]) == "".join(stored)


@pytest.mark.parametrize("sources", [None, (0,), (1,), (0, 1)])
@pytest.mark.parametrize("max_overlap", [None, 0.5])
def test_neighbours_are_training_text_of_another_document(corpus, max_overlap, sources):
    table = corpus[2].tables["train"]
    ids = np.arange(table.num_chunks)[None]
    keep = NeighbourFilter(max_overlap=max_overlap, sources=sources)
    batch = reader(corpus, "train", keep=keep).read(ids)
    chosen = corpus[2].neighbours["train"].select(ids, 3, keep=keep)
    found = chosen >= 0
    from_second = chosen[found] >= table.source_chunks[1]
    assert from_second.any() == (1 in (sources or (0, 1))) and (~from_second).any() == (0 in (sources or (0, 1)))
    assert found.mean() > 0.5
    assert (table.document_N[chosen] != table.document_N[ids][..., None])[found].all()
    tokens, lengths = table.gather(chosen, 2 * C)
    np.testing.assert_array_equal(batch.neighbours, tokens)
    np.testing.assert_array_equal(batch.neighbour_mask.sum(-1), lengths)
    assert (batch.neighbour_mask.any(-1) == found).all()


@pytest.mark.parametrize("keep", [KEEP_ALL, NeighbourFilter(max_overlap=0.25, sources=(1,))])
def test_held_out_rows_read_training_neighbours_own_or_anothers(corpus, keep):
    data = corpus[2]
    table = data.tables["test"]
    donors = shuffled_donors(table, data.neighbours["test"], 3, keep=keep, seed=0)
    rows = held_out_rows(table, window=4 * C, stride=2 * C)
    own = held_out_batches(rows, reader(corpus, "test", keep=keep), 4)
    others = held_out_batches(rows, reader(corpus, "test", keep=keep, donors=donors), 4)
    for (batch, ids), (shuffled, _) in zip(own, others, strict=True):
        there = ids >= 0
        expected, _ = data.tables["train"].gather(data.neighbours["test"].select(ids, 3, keep=keep), 2 * C)
        np.testing.assert_array_equal(batch.neighbours, expected)
        expected, _ = data.tables["train"].gather(data.neighbours["test"].select(donors[ids[there]], 3, keep=keep), 2 * C)
        np.testing.assert_array_equal(shuffled.neighbours[there], expected)
        np.testing.assert_array_equal(batch.neighbour_mask.any(-1).sum(-1), shuffled.neighbour_mask.any(-1).sum(-1))
        np.testing.assert_array_equal(batch.targets, shuffled.targets)
