"""The whole evaluation on a small corpus: files in, figures out, nothing done twice."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import (
    ChunkConfig,
    Config,
    CorpusConfig,
    EncoderConfig,
    EvalConfig,
    ModelConfig,
    RetrievalConfig,
    RetroConfig,
    TokenizerConfig,
)
from retro_jax.data.batch import Batch
from retro_jax.data.held_out import held_out_batches, held_out_rows
from retro_jax.data.reader import RowReader
from retro_jax.errors import UserError
from retro_jax.evaluation.perplexity import evaluate_perplexity, parameters_digest
from retro_jax.evaluation.scores import loss_step
from retro_jax.model import Retro, with_vocab
from retro_jax.prepare import prepare

WORDS = [a + b for a in ("tor", "mel", "ka", "vish", "on") for b in ("a", "eth", "ily", "o", "und", "is")]


def sentences(random, count):
    return " ".join(WORDS[i] for i in random.integers(0, len(WORDS), count)) + "."


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    shared = [sentences(random, 30) for _ in range(12)]
    lines = [
        {"text": " ".join([sentences(random, 12), shared[random.integers(12)], sentences(random, random.integers(1, 40))])}
        for _ in range(100)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    config = make_config(sources=(str(folder / "corpus.jsonl"),))
    return config, prepare(config, folder / "data", report=lambda line: None)


def make_config(sources=("python-docs",), **evaluation):
    chunks = ChunkConfig(chunk_len=16, num_neighbours=2, retrieved_len=32)
    encoder = EncoderConfig(num_layers=1)
    retro = RetroConfig(chunks=chunks, cca_layers=(2,), encoder=encoder)
    return Config(
        corpus=CorpusConfig(sources=sources, workers=1, valid_fraction=0.1, test_fraction=0.2),
        tokenizer=TokenizerConfig(vocab_size=512),
        chunks=chunks,
        retrieval=RetrievalConfig(features=2**12, workers=1),
        model=ModelConfig(width=32, num_layers=2, num_heads=2, retro=retro),
        evaluation=EvalConfig(**{"window": 64, "stride": 32, "batch_size": 3, "bootstrap_samples": 200, **evaluation}),
    )


def models(config, prepared, seed=0):
    model = with_vocab(config.model, prepared.tokenizer.vocab_size)
    return {"retro": build(model, seed + 1), "gpt": build(dataclasses.replace(model, retro=None), seed)}


def build(config, seed):
    """A model of NumPy's random numbers: its own initialization takes seconds to compile."""
    random = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: Retro(config, key=jax.random.key(0))))
    return nnx.merge(graph, jax.tree.map(lambda leaf: jax.numpy.asarray(random.normal(0.0, 0.1, leaf.shape), leaf.dtype), state))


def evaluate(prepared, folder, chosen=None, steps=None, **evaluation):
    config, data = prepared
    config = dataclasses.replace(config, evaluation=make_config(**evaluation).evaluation)
    return evaluate_perplexity(config, data, chosen or models(config, data), folder, steps=steps)


@pytest.fixture(scope="module")
def result(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluate(prepared, folder, steps={"gpt": 10, "retro": 10}), folder


def test_what_stands_in_the_result(prepared, result):
    (found, folder), (_, data) = result, prepared
    table = data.tables["test"]
    assert list(found["models"]) == ["gpt", "retro", "retro off", "retro shuffled"]
    assert list(found["differences"]) == ["gpt - retro", "retro off - retro", "retro shuffled - retro"]
    assert found["documents"] == table.num_documents
    # The first token is BOS: all text is in the targets, and EOD is one.
    first = np.flatnonzero(np.diff(table.document_N, prepend=-1))
    assert found["targets"] == table.remaining_N[first].sum()
    tokens, lengths = data.tables["test"].gather(first, int(table.remaining_N.max()))
    text = [data.tokenizer.decode_batch([row[1:n]])[0] for row, n in zip(tokens, lengths, strict=True)]
    assert found["bytes"] == sum(len(t.encode()) for t in text)
    assert found["steps"] == {"gpt": 10, "retro": 10} and found["data"] == data.fingerprints
    assert json.loads((folder / "perplexity-test.json").read_text()) == found
    assert (folder / "perplexity-test.png").read_bytes()[:4] == b"\x89PNG"


def test_the_loss_is_the_models(prepared, result):
    """Against logits of one document at a time, computed without the pipeline."""
    (found, _), (config, data) = result, prepared
    gpt = models(config, data)["gpt"]
    found_loss = evaluate(prepared, result[1] / "wide", {"gpt": gpt}, window=512, stride=512)["models"]["gpt"]["loss"]["value"]
    table = data.tables["test"]
    first = np.flatnonzero(np.diff(table.document_N, prepend=-1))
    L = -(-int(table.remaining_N.max()) // 16)
    tokens_DT, lengths_D = table.gather(first, L * 16 + 1, eod=True)
    at_DT = np.broadcast_to(np.arange(L * 16, dtype=np.int32), (len(first), L * 16))
    text_DT = at_DT < lengths_D[:, None] - 1
    batch = Batch(
        tokens=np.where(text_DT, tokens_DT[:, :-1], 0),
        targets=tokens_DT[:, 1:],
        segments=text_DT.astype(np.int32),
        positions=np.where(text_DT, at_DT, 0),
        loss_mask=text_DT.astype(np.float32),
        neighbours=np.zeros((len(first), L, 0, 32), np.int32),
        neighbour_mask=np.zeros((len(first), L, 0, 32), bool),
    )
    logits_DTV = np.asarray(gpt(jax.device_put(batch)) @ gpt.output_table_VD().T, np.float64)
    logits_DTV -= np.log(np.exp(logits_DTV).sum(-1, keepdims=True))
    losses_DT = -np.take_along_axis(logits_DTV, tokens_DT[:, 1:, None], -1)[..., 0]
    expected = losses_DT[text_DT].mean()
    assert found_loss == pytest.approx(expected, rel=1e-5)  # measured 2e-7
    # Windows give less context than whole documents, so the figures differ, but by little for an untrained model.
    assert found["models"]["gpt"]["loss"]["value"] != found_loss
    assert found["models"]["gpt"]["loss"]["value"] == pytest.approx(found_loss, rel=1e-2)


def test_off_is_the_model_with_all_neighbours_masked(prepared, result):
    config, data = prepared
    table = data.tables["test"]
    reader = RowReader(
        queries=table,
        database=data.tables["train"],
        neighbours=data.neighbours["test"],
        chunks=config.chunks,
        donors=np.full(table.num_chunks, -1),
    )
    step = loss_step(models(config, data)["retro"], config.training, retrieval=True)
    batches = list(held_out_batches(held_out_rows(table, window=64, stride=32), reader, 3))
    masked = sum(float(np.asarray(step(batch), np.float64).sum()) for batch, _ in batches)
    count = sum(batch.loss_mask.sum() for batch, _ in batches)
    modes = result[0]["models"]
    assert modes["retro off"]["loss"]["value"] == pytest.approx(masked / count, rel=1e-6)
    assert len({modes[row]["loss"]["value"] for row in ("retro", "retro off", "retro shuffled")}) == 3


def test_shared_passages_are_found(result):
    share = result[0]["bytes_share"]["by_overlap"]
    assert share["1.0"] == pytest.approx(1.0) and 0 < share["0.25"] < share["0.5"] < 1.0


def test_nothing_is_computed_twice(prepared, result, tmp_path, capsys, monkeypatch):
    found, folder = result
    monkeypatch.setattr("retro_jax.evaluation.perplexity.score_chunks", lambda *a, **k: pytest.fail("computed again"))
    again = evaluate(prepared, folder, steps={"gpt": 10, "retro": 10}, batch_size=7)
    assert again["models"] == found["models"]
    assert capsys.readouterr().err.count("nothing left to do") == 4


def test_other_parameters_are_computed(prepared, result):
    found, folder = result
    config, data = prepared
    other = {**models(config, data), "gpt": models(config, data, seed=5)["gpt"]}
    changed = evaluate(prepared, folder, other)
    assert changed["models"]["retro"] == found["models"]["retro"]
    assert changed["models"]["gpt"]["loss"] != found["models"]["gpt"]["loss"]


def test_digest_follows_every_parameter(prepared):
    config, data = prepared
    model = models(config, data)["retro"]
    before = parameters_digest(model)
    assert before == parameters_digest(models(config, data)["retro"])
    state = nnx.state(model, nnx.Param)
    _, leaf = nnx.to_flat_state(state)[3]
    leaf[...] = leaf[...].at[(0,) * leaf[...].ndim].add(1e-3)
    assert parameters_digest(model) != before


def test_some_documents_and_an_empty_split(prepared, tmp_path):
    found = evaluate(prepared, tmp_path, max_documents=5)
    assert found["documents"] == 5
    config, data = prepared

    class NoText:
        num_documents, chunk_len = 0, 16
        document_N = np.zeros(0, np.int64)

    empty = dataclasses.replace(data, tables={**data.tables, "test": NoText()})
    with pytest.raises(UserError, match="the test split has no text; raise CorpusConfig.test_fraction"):
        evaluate_perplexity(config, empty, {}, tmp_path)
