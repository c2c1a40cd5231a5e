"""From prepared data to the model and its baselines."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

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
    resolved,
)
from retro_jax.errors import UserError
from retro_jax.kernels import triton_call
from retro_jax.prepare import Prepared, prepare
from retro_jax.training.checkpoint import load_model
from retro_jax.training.metrics import METRICS, read_lines
from retro_jax.training.resume import differences
from retro_jax.training.train import check_run, model_configs, train_all, validation_batches
from tests.training.tiny import tiny_config

CHUNKS = ChunkConfig(chunk_len=8, retrieved_len=16)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny Retro with both baselines on 80 documents of words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(80)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Config(
        corpus=CorpusConfig(sources=(str(corpus),), valid_fraction=0.2, test_fraction=0.1, workers=1),
        tokenizer=TokenizerConfig(vocab_size=384),
        chunks=CHUNKS,
        retrieval=RetrievalConfig(features=4096, workers=1),
        data=DataConfig(seq_len=32, batch_size=4),
        model=ModelConfig(
            width=16,
            num_layers=1,
            num_heads=2,
            retro=RetroConfig(chunks=CHUNKS, encoder=EncoderConfig(num_layers=1), cca_layers=(1,)),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        training=TrainConfig(steps=6, baselines=("gpt", "gpt_matched"), log_every=1, valid_batches=2),
        evaluation=EvalConfig(window=32, stride=32),
    )


@pytest.fixture(scope="module")
def prepared(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(config, tmp_path_factory.mktemp("data"))


def test_the_model_and_its_baselines_are_trained_on_identical_rows(
    config: Config, prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = train_all(config, prepared, tmp_path, config_text="text = 1")
    told = capsys.readouterr().out
    assert list(folders) == ["retro", "gpt", "gpt_matched"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = {name: read_lines(folder / METRICS) for name, folder in folders.items()}
    targets = {name: [line["targets"] for line in found if "targets" in line] for name, found in lines.items()}
    assert targets["retro"] == targets["gpt"] == targets["gpt_matched"] and len(targets["gpt"]) == 6
    assert len({found[-1]["valid_targets"] for found in lines.values()}) == 1
    losses = {name: [line["loss"] for line in found if "loss" in line] for name, found in lines.items()}
    for name, values in losses.items():
        assert abs(values[0] - np.log(384)) < 0.1 and values[-1] < values[0] - 0.1, name
    for name in ("gpt", "gpt_matched"):
        assert load_model(folders[name])[0].config.retro is None
    model, step = load_model(folders["retro"], "best")
    assert model.config == dataclasses.replace(config.model, vocab_size=384) and step == 6
    assert "padding, read" in told and "retro: " in told and "steps of 4 x 32 tokens, float32 on cpu" in told
    train_all(config, prepared, tmp_path)
    assert capsys.readouterr().out.count("all 6 steps are done, nothing is left to do") == 3
    more = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=8))
    other = dataclasses.replace(prepared, fingerprints={**prepared.fingerprints, "neighbours": "another"})
    with pytest.raises(UserError, match="checkpoints/6 was trained on neighbours with fingerprint .*, now they have another"):
        train_all(more, other, tmp_path)


def test_the_form_of_the_rows_may_change_between_two_starts() -> None:
    old = resolved(DataConfig())
    assert differences(DataConfig, old, resolved(DataConfig(rows="joined"))) == []
    assert differences(DataConfig, old, resolved(DataConfig(rows="joined", seed=1))) == [("DataConfig.seed", 0, 1)]


@pytest.mark.slow
def test_a_run_goes_on_with_joined_rows_as_it_would_have_with_gathered_ones(
    config: Config, prepared: Prepared, tmp_path: Path
) -> None:
    """Three steps gathered, the others joined; the loss curve is that of a gathered run, byte for byte."""
    data = Path(prepared.tables["train"].__reduce__()[1][0])

    def of(rows: str, steps: int) -> Config:
        training = dataclasses.replace(config.training, steps=steps, baselines=(), log_every=1, valid_every=0)
        optimizer = dataclasses.replace(config.optimizer, schedule="constant")
        return dataclasses.replace(
            config, data=dataclasses.replace(config.data, rows=rows), training=training, optimizer=optimizer
        )

    joined = prepare(of("joined", 6), data, lambda line: None)
    assert prepared.joined is None and joined.joined is not None
    train_all(of("gathered", 6), prepared, tmp_path / "gathered")
    train_all(of("gathered", 3), prepared, tmp_path / "both")
    train_all(of("joined", 6), joined, tmp_path / "both")
    one, other = ((tmp_path / name / "models" / "retro" / METRICS).read_bytes() for name in ("gathered", "both"))
    assert one == other and len(one.splitlines()) == 6
    with pytest.raises(ValueError, match="prepared without joined rows"):
        train_all(of("joined", 9), prepared, tmp_path / "both")


def test_validation_sees_the_same_rows_each_time_spread_over_the_split(config: Config, prepared: Prepared) -> None:
    model = model_configs(config, 384)["retro"]
    batches = validation_batches(config, prepared, model)
    assert batches is not None
    first, again = ([ids for _, ids in batches()] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    chunks = np.concatenate([ids.ravel() for ids in first])
    chunks = chunks[chunks >= 0]
    table = prepared.tables["valid"]
    assert len(first) == 2 and chunks.min() < 0.25 * table.num_chunks and chunks.max() > 0.75 * table.num_chunks
    every = validation_batches(
        dataclasses.replace(config, training=dataclasses.replace(config.training, valid_batches=1000)), prepared, model
    )
    assert every is not None
    scored = sum(int(batch.loss_mask.sum()) for batch, _ in every())
    assert scored == int(np.minimum(table.remaining_N, CHUNKS.chunk_len).sum())  # each text token's successor once, EOD included


def test_no_validation_where_none_is_asked_for_and_a_word_where_there_is_no_text(
    config: Config, tmp_path: Path, prepared: Prepared
) -> None:
    model = model_configs(config, 384)["gpt"]
    off = dataclasses.replace(config, training=dataclasses.replace(config.training, valid_every=0))
    assert validation_batches(off, prepared, model) is None
    empty = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, valid_fraction=0.0))
    with pytest.raises(UserError, match=r"the valid split has no text .* set TrainConfig.valid_every=0"):
        validation_batches(empty, prepare(empty, tmp_path), model)


def test_a_vocabulary_below_the_tokenizers_is_refused(config: Config) -> None:
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    with pytest.raises(UserError, match="ModelConfig.vocab_size=300 is below the tokenizer's 384"):
        model_configs(small, 384)


def test_kernels_that_cannot_run_here_are_told_before_the_data(tmp_path: Path) -> None:
    config = tiny_config()
    by_triton = dataclasses.replace(config, model=dataclasses.replace(config.model, implementation="triton"))
    with pytest.raises(UserError, match="ModelConfig.implementation='triton' cannot run: it needs a GPU; or leave"):
        check_run(by_triton, tmp_path)
    dropped = dataclasses.replace(by_triton, model=dataclasses.replace(by_triton.model, attention_dropout=0.1))
    told = "no dropout of weights, and ModelConfig.attention_dropout=0.1"
    with mock.patch.object(triton_call, "unavailable", return_value=None), pytest.raises(UserError, match=told):
        check_run(dropped, tmp_path)
