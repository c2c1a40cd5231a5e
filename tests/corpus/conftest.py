"""Small tokenizers and corpora, made on the spot."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sentencepiece

from retro_jax.config import CorpusConfig, TokenizerConfig
from retro_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from retro_jax.corpus.tokenizer_stage import build_tokenizer

TEXT = "the chunk of a document is read by its neighbour and the model learns to copy what it finds there again"
WORDS = TEXT.split()
SENTENCES = [" ".join(WORDS[(3 * i + j * j) % len(WORDS)] for j in range(12)) + f" {i}.\n" for i in range(400)]


@pytest.fixture(scope="session")
def train_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a sentencepiece model on :data:`SENTENCES` and returns its path."""

    def train(**options: object) -> Path:
        model = io.BytesIO()
        options = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1} | options
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_writer=model, **options)
        path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
        path.write_bytes(model.getvalue())
        return path

    return train


@pytest.fixture(scope="session")
def llama_like(train_sentencepiece: Callable[..., Path]) -> Path:
    """A BPE with byte fallback and the dummy prefix, which changes no text: Llama's form."""
    return train_sentencepiece(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, vocab_size=500
    )


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Tokenizer]:
    """Builds the ``tokenizer`` artefact of a config and loads it."""

    def build(config: TokenizerConfig, sources: Sequence[str] = ("python-docs",)) -> Tokenizer:
        folder = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        build_tokenizer(config, CorpusConfig(sources=tuple(sources)), folder)
        return load_tokenizer(folder / "tokenizer")

    return build


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A ``.jsonl`` of 400 short documents."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES))
    return path
