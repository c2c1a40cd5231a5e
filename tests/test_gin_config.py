"""The edge: gin files and overrides to one checked config, and every way in which they can be wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import gin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.config import ChunkConfig, Config, CorpusConfig, ModelConfig, OptimizerConfig, RetroConfig, TrainConfig
from retro_jax.errors import UserError
from retro_jax.gin_config import config_json, config_text, find_config, load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(text, name)`` writes a gin file."""

    def write_file(text: str, name: str = "run.gin") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def refusal(*arguments: object) -> str:
    """The one sentence with which load_config refuses."""
    with pytest.raises(UserError) as caught:
        load_config(*arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_file_gives_the_defaults() -> None:
    assert load_config([]) == Config()


def test_values_of_every_kind_reach_their_fields(write: Write) -> None:
    config = load_config(
        [
            write(
                """
                # A comment.
                WIDTH = 96
                CorpusConfig.sources = ['a.jsonl', 'b.txt']  # a list for a tuple
                CorpusConfig.weights = (1, 2.5)
                CorpusConfig.max_documents = 10
                ModelConfig.width = %WIDTH
                ModelConfig.ffn_dim = %WIDTH
                ModelConfig.linear_bias = False
                ModelConfig.norm = 'rmsnorm'
                ModelConfig.implementation = None
                OptimizerConfig.learning_rate = 1
                OptimizerConfig.clip_norm = 0
                RetroConfig.gate = 'learned'
                RetroConfig.cca_layers = (2, 4)
                TrainConfig.baselines = ['gpt', 'gpt_matched']
                """
            )
        ]
    )
    expected = Config(
        corpus=CorpusConfig(sources=("a.jsonl", "b.txt"), weights=(1.0, 2.5), max_documents=10),
        model=ModelConfig(
            width=96, ffn_dim=96, linear_bias=False, norm="rmsnorm", retro=RetroConfig(gate="learned", cca_layers=(2, 4))
        ),
        optimizer=OptimizerConfig(learning_rate=1.0, clip_norm=0.0),
        training=TrainConfig(baselines=("gpt", "gpt_matched")),
    )
    assert config == expected
    assert type(config.optimizer.learning_rate) is float and type(config.corpus.weights[0]) is float  # type: ignore[index]


def test_blocks_and_macros_in_containers(write: Write) -> None:
    file = write("LAST = 6\nModelConfig:\n    num_layers = %LAST\n    width = 48\nRetroConfig.cca_layers = (3, %LAST)\n")
    model = load_config([file]).model
    assert (model.num_layers, model.width, model.cca_layers) == (6, 48, (3, 6))


def test_one_chunk_config_stands_in_both_places(write: Write) -> None:
    config = load_config([write("ChunkConfig.chunk_len = 32\nChunkConfig.retrieved_len = 64\n")])
    assert config.chunks == ChunkConfig(chunk_len=32, retrieved_len=64)
    assert config.model.retro is not None and config.model.retro.chunks is config.chunks


def test_gin_keeps_no_state_and_classes_stay_plain(write: Write) -> None:
    load_config([write("ModelConfig.width = 96\n")], ["TrainConfig.steps=7"])
    assert gin.config_str() == "" and gin.operative_config_str() == "" and not gin.config_is_locked()
    assert ModelConfig().width == 768 and ModelConfig.__module__ == "retro_jax.config.model"


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("CorpusConfig.sources=data/wiki.jsonl", "corpus.sources", ("data/wiki.jsonl",)),
        ("CorpusConfig.sources=/data/*.jsonl.gz", "corpus.sources", ("/data/*.jsonl.gz",)),
        ("CorpusConfig.sources=python-docs", "corpus.sources", ("python-docs",)),
        ("CorpusConfig.sources=tfds:wikipedia:train", "corpus.sources", ("tfds:wikipedia:train",)),
        ("CorpusConfig.sources=('a.txt', 'b.txt')", "corpus.sources", ("a.txt", "b.txt")),
        ("CorpusConfig.text_field=body", "corpus.text_field", "body"),
        ("CorpusConfig.split_by=group", "corpus.split_by", "group"),
        ("CorpusConfig.split_by='group'", "corpus.split_by", "group"),
        (" TrainConfig.steps = 5 ", "training.steps", 5),
        ("RetroConfig.gate=learned", "model.retro.gate", "learned"),
        ("RetroConfig.gate=0", "model.retro.gate", 0.0),
        ("ModelConfig.implementation=None", "model.implementation", None),
        ("ModelConfig.implementation=xla", "model.implementation", "xla"),
        ("TrainConfig.baselines=gpt", "training.baselines", ("gpt",)),
        ("TrainConfig.baselines=()", "training.baselines", ()),
    ],
)
def test_overrides(override: str, field: str, value: object) -> None:
    found: object = load_config([], [override])
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_an_override_is_above_the_file_and_reaches_macros(write: Write) -> None:
    file = write("STEPS = 10\nTrainConfig.steps = %STEPS\nModelConfig.width = 96\n")
    config = load_config([file], ["STEPS=20", "ModelConfig.width=48"])
    assert (config.training.steps, config.model.width) == (20, 48)


def test_a_file_may_set_anew_what_it_includes(write: Write) -> None:
    write("WIDTH = 48\nModelConfig.width = %WIDTH\nModelConfig.num_layers = 6\n", "parts/base.gin")
    write("include 'parts/base.gin'\nTrainConfig.steps = 5\nModelConfig.num_layers = 9\n", "middle.gin")
    config = load_config([write("include 'middle.gin'\nWIDTH = 96\nTrainConfig.steps = 7\n")])
    assert (config.model.width, config.model.num_layers, config.training.steps) == (96, 9, 7)


def test_a_file_included_on_two_ways_is_read_once(write: Write) -> None:
    write("ModelConfig.width = 96\n", "base.gin")
    write("include 'base.gin'\nTrainConfig.steps = 5\n", "a.gin")
    write("include 'base.gin'\nTrainConfig.accumulate = 2\n", "b.gin")
    config = load_config([write("include 'a.gin'\ninclude 'b.gin'\n")])
    assert (config.model.width, config.training.steps, config.training.accumulate) == (96, 5, 2)


def test_gpt_from_a_retro_file(write: Write) -> None:
    text = "RetroConfig.gate = 0.5\nEncoderConfig.num_layers = 1\nChunkConfig.chunk_len = 32\nModelConfig.width = 96\n"
    write(text, "retro.gin")
    config = load_config([write("include 'retro.gin'\nModelConfig.retro = None\n")])
    assert config.model == ModelConfig(width=96, retro=None) and config.chunks.chunk_len == 32
    again = load_config([write("include 'retro.gin'\nModelConfig.retro = None\n")], ["ModelConfig.retro=@RetroConfig()"])
    assert again.model.retro is not None and again.model.retro.gate == 0.5 and again.model.retro.encoder.num_layers == 1
    assert load_config([write("RetroConfig.gate = 0.5\n")], ["ModelConfig.retro=None"]).model.retro is None


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("ModelConfig.width = '96'", 1, r"ModelConfig.width = '96' is a string, an integer is wanted"),
        ("\nModelConfig.width = 96.0", 2, r"is a number, an integer is wanted"),
        ("ModelConfig.width = True", 1, r"is a bool, an integer is wanted"),
        ("OptimizerConfig.eps = True", 1, r"is a bool, a number is wanted"),
        ("OptimizerConfig.eps = 1e999", 1, r"is not finite, a number is wanted"),
        ("ModelConfig.linear_bias = 1", 1, r"is an integer, True or False is wanted"),
        ("ModelConfig.width = None", 1, r"is None, an integer is wanted"),
        ("CorpusConfig.text_field = 3", 1, r"is an integer, a string is wanted"),
        ("CorpusConfig.sources = 'a.txt'", 1, r"is a string, a tuple \(each entry a string\) is wanted"),
        ("CorpusConfig.sources = ('a.txt', 3)", 1, r"each entry a string"),
        ("CorpusConfig.max_documents = 'all'", 1, r"an integer or None is wanted"),
        ("CorpusConfig.split_by = 'book'", 1, r"'book' is not known; choose one of 'text', 'group'"),
        ("RetroConfig.gate = 'fixed'", 1, r"a number or 'learned' is wanted"),
        ("WIDTH = '96'\nModelConfig.width = %WIDTH", 2, r"is a string, an integer is wanted"),
        ("ModelConfig.width = @RetroConfig()", 1, r"is a class, an integer is wanted"),
        ("ModelConfig.retro = @EncoderConfig()", 1, r"write @RetroConfig\(\) or None"),
        ("ModelConfig.retro = @RetroConfig", 1, r"write @RetroConfig\(\) or None"),
        ("Config.model = None", 1, r"write @ModelConfig\(\)$"),
        ("ModlConfig.width = 96", 1, r"ModlConfig is not a config class; did you mean ModelConfig\?"),
        ("Banana.width = 96", 1, r"Banana is not a config class; the classes are Config, CorpusConfig"),
        ("ModelConfig.widht = 96", 1, r"ModelConfig has no field widht; did you mean ModelConfig.width\?"),
        ("ModelConfig.seq_len = 96", 1, r"did you mean DataConfig.seq_len\?"),
        ("ModelConfig.zzz = 96", 1, r"its fields are vocab_size"),
        ("WIDTH = 96", 1, r"macro WIDTH is never used"),
        ("width = 96", 1, r"a setting is named with its class: ModelConfig.width"),
        ("ModelConfig.width = %WIDHT\nDataConfig.seed = %WIDTH\nWIDTH = 9", 1, r"%WIDHT is not defined; did you mean %WIDTH\?"),
        ("A = %B\nB = %A\nModelConfig.width = %A", 2, r"is defined by itself"),
        ("ModelConfig.retro = None\n\nRetroConfig.gate = 1", 3, r"gate is not used, as ModelConfig.retro is None \(.*:1\)"),
        ("ModelConfig.retro = None\nEncoderConfig.num_layers = 1", 2, r"EncoderConfig.num_layers is not used"),
        ("a/ModelConfig.width = 96", 1, r"scopes are not used"),
        ("import os", 1, r"imports a module"),
        ("ModelConfig.width = 96\ninclude 'x.gin'", 2, r"move it to the top"),
        ("include 'nowhere.gin'", 1, r"nowhere.gin is not there; beside it there are run.gin"),
        ("ModelConfig.norm = rmsnorm", 1, r"rmsnorm is not a value; strings are quoted"),
        ("ModelConfig.width = ", 1, r"cannot be read"),
        ("ModelConfig.width", 1, r"cannot be read"),
        ("ModelConfig.width = 96 97", 1, r"cannot be read"),
        ("# one\nModelConfig.norm = 'rmsnorm", 2, r"cannot be read"),
        ("CorpusConfig.sources = ('a',\n'b'", 1, r"cannot be read"),
        ("ModelConfig.width = 1\n  $", 2, r"cannot be read"),
        ("ModelConfig:\nwidth = 96", 2, r"cannot be read"),
    ],
)
def test_a_wrong_line_is_named(write: Write, text: str, line: int, message: str) -> None:
    refused = refusal([write(text)])
    assert re.search(message, refused), refused
    # Python 3.11 and 3.12 put the end of an open bracket on different lines.
    assert f"run.gin:{line}" in refused or "EOF in multi-line" in refused, refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ModelConfig.width", "not of the form Class.field=value"),
        ("ModelConfig/width=3", "not of the form Class.field=value"),
        ("ModelConfig.width=wide", "wide is not a value"),
        ("ModelConfig.width='96'", "is a string, an integer is wanted"),
        ("ModelConfig.widht=96", "did you mean ModelConfig.width?"),
        ("ModelConfig.width=96\nModelConfig.num_layers=3", "more than one value"),
        ("CorpusConfig.sources=('a.txt'", "cannot be read"),
        ("WIDTH=96", "macro WIDTH is never used"),
        ("CorpusConfig.text_field=3", "is an integer, a string is wanted"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    refused = refusal([], [override])
    assert message in refused and f"--set {' '.join(override.split())}" in refused


def test_double_bindings_are_refused(write: Write) -> None:
    assert "run.gin:1 and" in refusal([write("ModelConfig.width = 96\nModelConfig.width = 96\n")])
    assert "run.gin:3;" in refusal([write("W = 96\nModelConfig.width = %W\nW = 48\n")])
    assert "set twice" in refusal([write("ModelConfig.width = 1\nModelConfig:\n  width = 96\n")])
    assert "set twice" in refusal([], ["TrainConfig.steps=1", "TrainConfig.steps=2"])
    write("ModelConfig.width = 48\n", "a.gin")
    b = write("ModelConfig.width = 96\n", "b.gin")
    refused = refusal([write("include 'a.gin'\ninclude 'b.gin'\n")])
    assert "a.gin:1" in refused and "b.gin:1" in refused
    assert "set twice" in refusal([b, write("ModelConfig.width = 48\n")])
    assert load_config([write("include 'a.gin'\ninclude 'b.gin'\nModelConfig.width = 24\n")]).model.width == 24
    # An inner double binding is an error also where an outer file sets the field anew.
    write("ModelConfig.width = 48\nModelConfig.width = 48\n", "a.gin")
    assert "a.gin:1 and" in refusal([write("include 'a.gin'\nModelConfig.width = 24\n")])


def test_circular_include(write: Write) -> None:
    write("include 'run.gin'\n", "a.gin")
    assert "includes it in turn" in refusal([write("include 'a.gin'\n")])


@pytest.mark.parametrize(
    ("text", "overrides", "places"),
    [
        ("ModelConfig.width = 100\n\nModelConfig.num_heads = 7", [], ["width is set by {}:1", "num_heads is set by {}:3"]),
        ("DataConfig.seq_len = 100", [], ["not a multiple of ChunkConfig.chunk_len=64; use 128", "seq_len is set by {}:1"]),
        ("DataConfig.seq_len = 96", ["ChunkConfig.chunk_len=64"], ["--set ChunkConfig.chunk_len=64", "seq_len is set by {}:1"]),
        ("ModelConfig.num_layers = 3", [], ["set RetroConfig.cca_layers", "num_layers is set by {}:1"]),
        ("TrainConfig.steps = 0", [], ["TrainConfig.steps=0 must be positive", "steps is set by {}:1"]),
        ("DataConfig.neighbour_sources = (0, 1)", [], ["not all in 0 to 0, the numbers", "neighbour_sources is set by {}:1"]),
        ("RetrievalConfig.saved = 1", [], ["is above RetrievalConfig.saved=1", "saved is set by {}:1"]),
    ],
)
def test_contradictions_name_where_each_side_is_set(write: Write, text: str, overrides: list[str], places: list[str]) -> None:
    file = write(text)
    refused = refusal([file], overrides)
    for place in places:
        assert place.format(file) in refused, refused


def test_files_that_are_not_there_or_not_text(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = refusal(["quickstrat"])
    assert "did you mean quickstart?" in refused and "configs/ has" in refused
    assert "is not there" in refusal([tmp_path / "none.gin"])
    assert "is not there" in refusal([tmp_path])
    (tmp_path / "latin.gin").write_bytes(b"# caf\xe9\n")
    assert "is not UTF-8 text" in refusal([tmp_path / "latin.gin"])
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == CONFIGS / "quickstart.gin" == find_config("quickstart.gin")
    write("TrainConfig.steps = 3\n", "configs/quickstart.gin")
    assert load_config(["quickstart"]).training.steps == 3


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3),
    rate=st.floats(1e-8, 1e3),
    gate=st.one_of(st.just("learned"), st.floats(0, 2)),
    retro=st.booleans(),
    bias=st.booleans(),
    documents=st.one_of(st.none(), st.integers(1, 10**12)),
)
def test_text_is_read_back_as_the_same_config(
    tmp_path_factory: pytest.TempPathFactory,
    sources: list[str],
    rate: float,
    gate: float | str,
    retro: bool,
    bias: bool,
    documents: int | None,
) -> None:
    config = Config(
        corpus=CorpusConfig(sources=tuple(sources), max_documents=documents),
        optimizer=OptimizerConfig(learning_rate=rate, min_learning_rate=0.0),
        model=ModelConfig(linear_bias=bias, retro=RetroConfig(gate=gate) if retro else None),  # type: ignore[arg-type]
    )
    file = tmp_path_factory.mktemp("text") / "stored.gin"
    file.write_text(config_text(config), encoding="utf-8")
    assert load_config([file]) == config


def test_text_holds_every_field_and_json_the_same() -> None:
    config = Config()
    text = config_text(config)
    for part in (config.corpus, config.model, config.model.retro, config.model.retro.encoder, config.chunks):  # type: ignore[union-attr]
        for field in dataclasses.fields(part):
            assert text.count(f"{type(part).__name__}.{field.name} = ") == 1
    assert json.loads(config_json(config)) == json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize("name", sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.gin")))
def test_resolved_configs_are_golden(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"configs/{name}", config_text(load_config([CONFIGS / name])))
