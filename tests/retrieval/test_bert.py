"""Sentence encoders of BERT's form: their vectors, the folders they come from, and the whole way from text to neighbours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retro_jax.artefact import open_artefact
from retro_jax.config import (
    BertConfig,
    ChunkConfig,
    Config,
    CorpusConfig,
    ModelConfig,
    RetrievalConfig,
    RetroConfig,
    TokenizerConfig,
)
from retro_jax.errors import UserError
from retro_jax.prepare import prepare
from retro_jax.retrieval.bert import BertEmbedder
from retro_jax.retrieval.bert_tower import BertTower, _OnDevices, padded_length
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.embedder import build_embedder, load_embedder
from tests.retrieval.bert_model import write_bert

# Of 19, 4 and, cut, as many tokens as are read; each length is a program to compile.
TEXTS = ["A man is eating food.", "a?", "The girl is carrying a baby, " * 4]


def config_of(folder: Path, **settings: object) -> RetrievalConfig:
    return RetrievalConfig(embedder="bert", workers=1, bert=BertConfig(path=str(folder), **settings))  # type: ignore[arg-type]


def embedder(folder: Path, **settings: object) -> BertEmbedder:
    return BertEmbedder.load(folder, BertEmbedder.facts(config_of(folder, **settings)))


@pytest.fixture
def folder(bert_dir: Path, tmp_path: Path) -> Path:
    """A folder to be changed."""
    return shutil.copytree(bert_dir, tmp_path / "bert")


def on_devices(tower: BertTower, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Load its model on some of the tests' devices."""
    devices = jax.local_devices()[:count]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert tower._model._mesh.size == count
    monkeypatch.undo()


def rewrite(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    told = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in {**told, **changes}.items() if v is not None}))


def reweigh(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors")


def without_pooler(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in weights.items() if not name.startswith("pooler")}


@pytest.mark.torch
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_vectors_are_those_of_transformers(folder: Path, activation: str) -> None:
    """Each pooling, with padding, and with a text that is cut."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rewrite(folder, "config.json", hidden_act=activation)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    model = transformers.BertModel.from_pretrained(folder).eval()
    given = tokenizer(TEXTS, padding=True, truncation=True, max_length=50, return_tensors="pt", return_special_tokens_mask=True)
    words = given.pop("special_tokens_mask") == 0
    with torch.no_grad():
        states = model(**given).last_hidden_state
    first = torch.zeros_like(words)
    first[:, 0] = True
    for pooling, counted in (("mean", given["attention_mask"] > 0), ("mean_without_special", words), ("cls", first)):
        mean = (states * counted[:, :, None]).sum(1) / counted.sum(1, keepdim=True)
        wanted = torch.nn.functional.normalize(mean).numpy()
        found = embedder(folder, pooling=pooling, max_length=50).embed(TEXTS)
        np.testing.assert_allclose(found, wanted, atol=1e-6)  # measured 2.1e-7


def test_poolings_differ(bert_dir: Path) -> None:
    vectors = [embedder(bert_dir, pooling=pooling).embed(TEXTS[:1]) for pooling in ("mean", "mean_without_special", "cls")]
    assert min(np.abs(a - b).max() for a, b in zip(vectors, vectors[1:] + vectors[:1], strict=True)) > 1e-2


def test_bfloat16_is_near(bert_dir: Path) -> None:
    exact, rough = (embedder(bert_dir, precision=precision).embed(TEXTS) for precision in ("float32", "bfloat16"))
    cosines = (exact * rough).sum(1)
    assert 1e-6 < (1 - cosines).max() < 2e-4  # measured 4.5e-5


def test_what_the_folder_says_is_done(folder: Path) -> None:
    """Pooling and length as sentence-transformers keeps them beside a model; a setting goes before them."""
    plain = BertEmbedder.facts(config_of(folder))
    assert (plain["pooling"], plain["max_length"], plain["dim"]) == ("mean", 72, 24)
    rewrite(
        folder, "1_Pooling/config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False, word_embedding_dimension=24
    )
    rewrite(folder, "sentence_bert_config.json", max_seq_length=16)
    told = BertEmbedder.facts(config_of(folder))
    assert (told["pooling"], told["max_length"]) == ("cls", 16)
    set_ = BertEmbedder.facts(config_of(folder, pooling="mean", max_length=30))
    assert (set_["pooling"], set_["max_length"]) == ("mean", 30)
    assert [len(ids) for ids in embedder(folder).token_ids(TEXTS)] == [16, 4, 16]


def test_a_prefix_stands_before_every_text(bert_dir: Path) -> None:
    prefixed, plain = embedder(bert_dir, prefix="query: "), embedder(bert_dir)
    np.testing.assert_array_equal(prefixed.embed(["a man"]), plain.embed(["query: a man"]))
    assert (prefixed.embed(["", "  \n"]) == 0).all()


def test_what_searches_has_a_prefix_of_its_own(bert_dir: Path) -> None:
    """E5's: one model, its parameters loaded once."""
    model, plain = embedder(bert_dir, prefix="passage: ", query_prefix="query: "), embedder(bert_dir)
    np.testing.assert_array_equal(model.embed(["a man"]), plain.embed(["passage: a man"]))
    np.testing.assert_array_equal(model.embed_queries(["a man"]), plain.embed(["query: a man"]))
    assert model.queries._model is model.passages._model
    np.testing.assert_array_equal(plain.embed_queries(TEXTS), plain.embed(TEXTS))


def test_two_towers(bert_dir: Path, folder: Path, tmp_path: Path, corpus_dir: Path) -> None:
    """The database by one model, what searches by another; the artefact holds both and knows both by their weights."""
    reweigh(folder, lambda weights: {name: 1.1 * array for name, array in weights.items()})
    rewrite(folder, "1_Pooling/config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    config = config_of(bert_dir, query_path=str(folder))
    assert not config.symmetric and config_of(bert_dir).symmetric
    built = build_embedder(config, ChunkTexts.of(corpus_dir), tmp_path / "embedder")
    assert built.settings["weights"] != built.settings["query_weights"]
    told = built.summary
    assert (told["name"], told["pooling"], told["query_name"], told["query_pooling"]) == (bert_dir.name, "mean", "bert", "cls")
    assert told["dim"] == 24 and told["parameters"] == told["query_parameters"]
    model = load_embedder(tmp_path / "embedder")
    passages, queries = model.embed(TEXTS), model.embed_queries(TEXTS)
    np.testing.assert_array_equal(passages, embedder(bert_dir).embed(TEXTS))
    np.testing.assert_array_equal(queries, embedder(folder).embed(TEXTS))
    assert np.abs(passages - queries).max() > 0.1
    reweigh(folder, lambda weights: {name: 1.1 * array for name, array in weights.items()})
    with pytest.raises(UserError, match="was built with setting query_weights="):
        build_embedder(config, ChunkTexts.of(corpus_dir), tmp_path / "embedder")


def test_towers_of_other_widths_are_refused(bert_dir: Path, tmp_path: Path) -> None:
    other = write_bert(tmp_path / "wide", hidden_size=36)
    with pytest.raises(UserError, match="wide' gives 36 dimensions and path=.* 24; take both from one release"):
        BertEmbedder.facts(config_of(bert_dir, query_path=str(other)))


@pytest.mark.parametrize("modules", [None, ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]])
def test_vectors_have_the_length_that_the_folder_or_the_config_says(folder: Path, modules: list[str] | None) -> None:
    """The same directions either way."""
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{name}"} for name in modules]))
    auto, always, never = (embedder(folder, normalize=value).embed(TEXTS) for value in ("auto", "yes", "no"))
    lengths = np.linalg.norm(never, axis=1)
    assert np.abs(lengths - 1).min() > 0.1
    np.testing.assert_allclose(never / lengths[:, None], always, atol=1e-6)  # measured 1.2e-7
    np.testing.assert_array_equal(auto, never if modules == ["Transformer", "Pooling"] else always)


def test_the_names_of_other_releases(bert_dir: Path, folder: Path) -> None:
    """As a pretraining checkpoint holds them: prefixed, norms by gamma and beta, heads and buffers beside, in two files."""

    def first_release(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        weights = {f"bert.{name}": array for name, array in without_pooler(weights).items()}
        weights = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): a
                   for n, a in weights.items()}  # fmt: skip
        return {**weights, "cls.predictions.bias": np.zeros(7, np.float32), "bert.embeddings.position_ids": np.arange(72)[None]}

    reweigh(folder, first_release)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number in range(2):
        part = {name: weights[name] for name in sorted(weights)[number::2]}
        save_file(part, folder / f"model-{number + 1:05d}-of-00002.safetensors")
    np.testing.assert_array_equal(embedder(folder).embed(TEXTS), embedder(bert_dir).embed(TEXTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type='roberta'; only 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'; only 'absolute'"),
        ({"is_decoder": True}, "is_decoder=True; only False"),
        ({"add_cross_attention": True}, "add_cross_attention=True; only False"),
        ({"hidden_act": "silu"}, "hidden_act='silu'; those that can be read are gelu"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]}; only encoders without it"),
        ({"num_attention_heads": 5}, "hidden_size=24, which num_attention_heads=5 does not divide"),
        ({"layer_norm_eps": None}, "config.json has no layer_norm_eps"),
        ({"num_hidden_layers": 3}, "16 missing: encoder.layer.2.attention.self.query.weight,"),
        ({"num_hidden_layers": 1}, "16 unexpected: encoder.layer.1.attention.output.LayerNorm.bias,"),
        ({"intermediate_size": 41}, "of another shape: encoder.layer.0.intermediate.dense.weight (40, 24), wanted (41, 24)"),
        ({"vocab_size": 90}, "tokenizer.json has ids up to 92, but the model has 90 words"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_computed(folder: Path, tmp_path: Path, corpus_dir: Path, change: dict, message: str) -> None:
    """Refused in one sentence, and nothing is left that would hinder the right folder."""
    rewrite(folder, "config.json", **change)
    with pytest.raises(UserError) as raised:
        build_embedder(config_of(folder), ChunkTexts.of(corpus_dir), tmp_path / "embedder")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "embedder").exists() and not (tmp_path / "embedder.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json; give a folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "has no *.safetensors; load the model with transformers"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678901234"), "cannot be read as safetensors"),
        (lambda f: reweigh(f, lambda w: {**w, "extra": np.zeros(1, np.float32)}), "1 unexpected: extra"),
        (lambda f: reweigh(f, lambda w: {n: np.where(n.endswith("1.output.dense.bias"), np.nan, a).astype(a.dtype)
                                         for n, a in w.items()}), "encoder.layer.1.output.dense.bias holds numbers that are not"),
        (lambda f: (f / "modules.json").write_text('[{"type": "sentence.models.Dense"}]'), "has a module Dense; only"),
        (lambda f: rewrite(f, "1_Pooling/config.json", pooling_mode_max_tokens=True), "asks for pooling_mode_max_tokens; set"),
        (lambda f: rewrite(f, "config.json", hidden_size=None), "hidden_size=None; an encoder of BERT's form has a whole number"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(folder: Path, tmp_path: Path, corpus_dir: Path, change: Callable, message: str) -> None:
    change(folder)
    with pytest.raises(UserError) as raised:
        build_embedder(config_of(folder), ChunkTexts.of(corpus_dir), tmp_path / "embedder")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "embedder").exists()


def test_settings_that_are_refused(bert_dir: Path) -> None:
    with pytest.raises(ValueError, match="embedder='bert' loads a model; set BertConfig.path"):
        RetrievalConfig(embedder="bert")
    with pytest.raises(ValueError, match="query_path='q' embeds what searches; set BertConfig.path"):
        BertConfig(query_path="q")
    with pytest.raises(ValueError, match="max_length=2 must be at least 3"):
        BertConfig(max_length=2)
    with pytest.raises(UserError, match="max_length=100 is above the model's 72 positions"):
        BertEmbedder.facts(config_of(bert_dir, max_length=100))


def test_the_artefact_is_whole_by_itself_and_knows_its_weights(folder: Path, tmp_path: Path, corpus_dir: Path) -> None:
    texts = ChunkTexts.of(corpus_dir)
    built = build_embedder(config_of(folder), texts, tmp_path / "embedder")
    weights = load_file(folder / "model.safetensors")
    parameters = sum(array.size for array in without_pooler(weights).values())
    assert built.summary == {"name": "bert", "dim": 24, "pooling": "mean", "parameters": parameters}
    expected = embedder(folder).embed(TEXTS)
    reweigh(folder, lambda weights: {name: 1.5 * array for name, array in weights.items()})
    with pytest.raises(UserError, match="was built with setting weights='[0-9a-f]{16}', now weights="):
        build_embedder(config_of(folder), texts, tmp_path / "embedder")
    shutil.rmtree(folder)
    np.testing.assert_array_equal(load_embedder(tmp_path / "embedder").embed(TEXTS), expected)


def test_few_shapes_and_little_padding(bert_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every length up to 512 in 32 programs, rows of a length depending on it alone; rows from 128 tokens on padded by at most an
    eighth."""
    padded = np.array([padded_length(length, 512) for length in range(1, 513)])
    lengths = np.arange(1, 513)
    assert len(set(padded)) == 32 and (padded >= lengths).all() and (padded - lengths)[:128].max() < 8
    assert (padded / lengths)[127:].max() < 1.13
    assert padded_length(70, 72) == 72 and padded_length(45, 50) == 48 and padded_length(49, 50) == 50
    model = embedder(bert_dir)
    on_devices(model.passages, monkeypatch, 1)
    shapes: list[tuple[int, ...]] = []
    call = _OnDevices.__call__
    monkeypatch.setattr(
        _OnDevices,
        "__call__",
        lambda self, tokens, *rest, **also: shapes.append(tokens.shape) or call(self, tokens, *rest, **also),
    )
    model.embed(["abc"] * 150 + ["a" * 20])
    assert shapes == [(32, 8)] * 5 + [(10, 24)]


@pytest.mark.parametrize("devices", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_devices_share_the_rows_and_change_nothing(bert_dir: Path, monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    """To the bit: each device has as many rows as one alone, and rows that no text fills make the last batch whole."""
    texts = [*TEXTS[:2], *(f"text {number} of many" for number in range(75))]
    alone, together = embedder(bert_dir), embedder(bert_dir)
    on_devices(alone.passages, monkeypatch, 1)
    on_devices(together.passages, monkeypatch, devices)
    assert together.passages._model.rows(24) == devices * alone.passages._model.rows(24) == devices * 10
    vectors = together.embed(texts)
    np.testing.assert_array_equal(vectors, alone.embed(texts))
    np.testing.assert_array_equal(together.embed(texts[::-1]), vectors[::-1])
    shards = together.passages._model(*next(together.passages._batches(together.passages._encoded(texts)))[1], normalize=True)
    assert len({shard.device for shard in shards.addressable_shards}) == devices
    assert {shard.data.shape[0] for shard in shards.addressable_shards} == {shards.shape[0] // devices}


def test_jax_is_imported_where_an_encoder_runs_and_nowhere_else() -> None:
    program = "import sys, retro_jax.retrieval.embedding; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_from_text_to_neighbours(bert_dir: Path, tmp_path: Path) -> None:
    """Documents that stand twice find each other, at a distance of nothing; near copies find their original."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 2 + i % 5)) for i in range(200)]
    originals = [" ".join(rng.choice(words, 12)) for _ in range(60)]
    near = [text + " z" for text in originals[:20]]
    source = tmp_path / "corpus.jsonl"
    numbered = [*originals, *near, *originals[20:40]]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in numbered))
    chunks = ChunkConfig(chunk_len=64, num_neighbours=2, retrieved_len=64)
    config = Config(
        corpus=CorpusConfig(sources=(str(source),), valid_fraction=0.0, test_fraction=0.1, workers=1),
        tokenizer=TokenizerConfig(vocab_size=400),
        chunks=chunks,
        model=ModelConfig(retro=RetroConfig(chunks=chunks)),
        retrieval=replace(config_of(bert_dir), saved=10, workers=2, block_chunks=32),
    )
    prepared = prepare(config, tmp_path / "data")
    table, found = prepared.tables["train"], prepared.neighbours["train"]
    texts = table.texts(np.arange(table.num_chunks), prepared.tokenizer)
    nearest = np.array(found.ids_NS[:, 0])
    twins = near_copies = 0
    for number, text in enumerate(texts):
        if texts.count(text) == 2:
            twins += 1
            assert texts[nearest[number]] == text and abs(found.distances_NS[number, 0]) < 1e-6
        elif text.endswith(" z") and text.removesuffix(" z") in texts:
            near_copies += 1
            assert texts[nearest[number]] == text.removesuffix(" z")
            assert 1e-6 < found.distances_NS[number, 0] < found.distances_NS[number, 1]
    assert twins > 20 and near_copies > 8
    vectors = open_artefact(tmp_path / "data" / "vectors", "vectors")
    np.testing.assert_array_equal(vectors.array("train.vectors"), embedder(bert_dir).embed(texts))
    distances = 1 - vectors.array("test.vectors") @ vectors.array("train.vectors").T
    found = prepared.neighbours["test"].distances_NS
    np.testing.assert_allclose(found, np.sort(distances, axis=1)[:, :10], atol=1e-6)  # measured 1.8e-7
