"""A corpus of random words on the chunk grid, a token each, and a model of two layers that learns to copy from neighbours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from retro_jax.config import (
    ChunkConfig,
    Config,
    CorpusConfig,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RetrievalConfig,
    RetroConfig,
    TokenizerConfig,
    TrainConfig,
)

WORDS, CHUNK, CHUNKS = 256, 16, 8


def spoken(words: np.ndarray) -> str:
    """Words, int, as text."""
    return "".join(f" w{word:03d}" for word in words.reshape(-1))


def planted_config(
    folder: Path, texts: Sequence[str], steps: int, *, baselines: tuple[str, ...] = (), test_fraction: float = 0.1, seed: int = 0
) -> Config:
    """Write corpus and tokenizer into ``folder``, and give the config that trains on them."""
    with open(folder / "corpus.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens(["<eod>"])
    words.add_tokens([f" w{word:03d}" for word in range(WORDS)])
    words.save(str(folder / "words.json"))
    chunks = ChunkConfig(chunk_len=CHUNK, num_neighbours=2, retrieved_len=2 * CHUNK)
    encoder = EncoderConfig(num_layers=1, final_norm=True)
    retro = RetroConfig(chunks=chunks, encoder=encoder, cca_layers=(2,), cca_init="copy", conv_width=4, null_key=0.0)
    return Config(
        corpus=CorpusConfig(sources=(str(folder / "corpus.jsonl"),), valid_fraction=0.0, test_fraction=test_fraction, workers=1),
        tokenizer=TokenizerConfig(kind="tokenizer_json", path=str(folder / "words.json"), eod="<eod>", bos=""),
        chunks=chunks,
        retrieval=RetrievalConfig(saved=4, workers=1),
        data=DataConfig(seq_len=CHUNK * CHUNKS, batch_size=16, seed=seed),
        model=ModelConfig(width=64, num_layers=2, num_heads=4, max_positions=256, retro=retro),
        optimizer=OptimizerConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=20),
        training=TrainConfig(steps=steps, seed=seed, baselines=baselines, valid_every=0, checkpoint_every=10_000, log_every=20),
        evaluation=EvalConfig(window=CHUNK * CHUNKS, stride=CHUNK * CHUNKS, overlap_neighbours=4),
    )
