"""A small corpus on disk, made by the corpus room: words of a Zipf-like law, with documents that repeat passages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from retro_jax.config import ChunkConfig, CorpusConfig, TokenizerConfig
from retro_jax.corpus.chunk_table import build_chunks
from retro_jax.corpus.token_stage import build_tokens
from retro_jax.corpus.tokenizer_stage import build_tokenizer
from tests.retrieval.bert_model import write_bert


def write_documents(path: Path, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    words = np.array(["".join(rng.choice(list("abcdefghij"), 3 + i % 5)) for i in range(400)])
    share = 1 / np.arange(1, 401)
    share /= share.sum()
    texts: list[str] = []
    for _ in range(count):
        body = rng.choice(words, rng.integers(5, 80), p=share).tolist()
        if texts and rng.random() < 0.4:
            body += rng.choice(texts).split()[:30]
        texts.append(" ".join(body))
    # One chunk that stands in many documents, and texts without a word.
    texts += [f"{'licence granted hereby ' * 8} {i}" for i in range(12)] + ["? ! ? !", ". . . ."]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")


def build_corpus(data_dir: Path, *, seed: int = 0, count: int = 60, chunk_len: int = 16) -> Path:
    data_dir.mkdir(parents=True)
    source = data_dir.parent / f"{data_dir.name}.jsonl"
    write_documents(source, seed, count)
    corpus = CorpusConfig(sources=(str(source),), valid_fraction=0.1, test_fraction=0.15, workers=1)
    build_tokenizer(TokenizerConfig(vocab_size=400), corpus, data_dir)
    build_tokens(corpus, data_dir)
    build_chunks(ChunkConfig(chunk_len=chunk_len, retrieved_len=2 * chunk_len), data_dir)
    return data_dir


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with tokenizer, tokens and chunks; copy it before building more in it."""
    return build_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny encoder; copy it before changing it."""
    return write_bert(tmp_path_factory.mktemp("bert") / "tiny-bert")
