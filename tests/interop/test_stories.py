"""A trained Llama of 260 thousand weights is read, computes its reference logits, tells its story, becomes a Retro, and goes to
transformers and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.stories260k import STORIES, write_model
from retro_jax.cli import main
from retro_jax.data.batch import Batch
from retro_jax.interop.checkpoints import open_checkpoint
from retro_jax.interop.slots import form_of, slots, stacked
from retro_jax.interop.verify import logits, transformers_logits
from retro_jax.training.checkpoint import load_model
from tests.training.tiny import run, tiny_config

needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="needs the trained model in ../shared/data, which is not there")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder of Hugging Face."""
    return write_model(tmp_path_factory.mktemp("stories"))


def row(tokens_T: np.ndarray) -> Batch:
    """One row without neighbours."""
    tokens = tokens_T[None]
    return Batch(
        tokens=tokens,
        targets=tokens,
        segments=np.ones(tokens.shape, np.int32),
        positions=np.arange(len(tokens_T), dtype=np.int32)[None],
        loss_mask=np.ones(tokens.shape, np.float32),
        neighbours=np.zeros((1, 1, 0, 1), np.int32),
        neighbour_mask=np.zeros((1, 1, 0, 1), bool),
    )


@needs_stories
def test_reference_logits_and_the_story(folder: Path) -> None:
    opened = open_checkpoint("huggingface", folder, None)
    with np.load(STORIES / "reference_logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    np.testing.assert_allclose(logits(opened.config, opened.source, row(tokens), None)[0], expected, atol=1e-4)
    params = stacked(opened.config, {name: opened.source.read(name) for name in slots(opened.config)})
    graph, state = nnx.split(form_of(opened.config).merge(jax.tree.map(jnp.asarray, params), {}))

    @jax.jit
    def likeliest_T(state: nnx.State, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, state)
        return jnp.argmax(model(batch)[0] @ model.output_table_VD().T, axis=-1)

    told = np.zeros_like(tokens)
    told[0] = tokens[0]
    for length in range(1, len(told)):
        told[length] = likeliest_T(state, row(told))[length - 1]
    pieces = json.loads((STORIES / "stories260K.json").read_text())["vocab_latin1"]
    story = "".join(pieces[token] for token in told[1:])
    assert story.startswith(" Once upon a time, there was a little girl named Lily.")
    np.testing.assert_array_equal(told, tokens)


@needs_stories
def test_retro_fitted_trained_and_exported(folder: Path, tmp_path: Path) -> None:
    """It becomes a Retro, the retrieval alone is trained, and transformers gets the decoder back as it was."""
    pytest.importorskip("torch")
    config = tiny_config(steps=3, start_from=str(folder), trained="retrieval")
    llama = open_checkpoint("huggingface", folder, None).config
    retro = dataclasses.replace(llama, retro=dataclasses.replace(config.model.retro, cca_layers=(3, 5)))
    assert run(tmp_path / "retro", config, model=retro) == 3
    model, _ = load_model(tmp_path / "retro")
    gained = [np.abs(stack.group.layers[0].cca.out.weight[...]).max() for stack in model.decoder if stack.group.layers[0].cca]
    assert gained and min(gained) > 0
    out = tmp_path / "out"
    assert main(["convert", *f"--from run --to huggingface --verify --input {tmp_path / 'retro'} --output {out}".split()]) == 0
    tokens = np.random.default_rng(0).integers(0, 512, (1, 40), np.int32)
    theirs = transformers_logits(out, tokens)
    np.testing.assert_array_equal(theirs, transformers_logits(folder, tokens))
    graph, state = nnx.split(model)
    hidden = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch))(state, row(tokens[0]))
    np.testing.assert_allclose(hidden @ model.output_table_VD().T, theirs, atol=1e-4)


@needs_stories
def test_to_transformers(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out"
    arguments = ["--from", "huggingface", "--to", "huggingface", "--input", str(folder), "--output", str(out), "--verify"]
    assert main(["convert", *arguments]) == 0
    tokens = np.random.default_rng(0).integers(0, 512, (2, 40))
    np.testing.assert_array_equal(transformers_logits(out, tokens), transformers_logits(folder, tokens))
