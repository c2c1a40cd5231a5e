"""A GPT's checkpoint becomes a Retro that at first computes the same, bit for bit, and learns from there."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from retro_jax.config import Config, ModelConfig, TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.errors import UserError
from retro_jax.interop.checkpoints import Opened, write_checkpoint
from retro_jax.interop.files import MemorySource, new_folder
from retro_jax.interop.format import OURS, entries
from retro_jax.interop.slots import slots, take
from retro_jax.model import Retro
from retro_jax.training.checkpoint import load_model
from retro_jax.training.optimizer import RETRIEVAL_PARTS, is_retrieval, is_trained
from retro_jax.training.start import from_checkpoint
from retro_jax.training.state import ModelForm, TrainState, initial_state, model_form
from retro_jax.training.train import check_run
from tests.model.build import gpt, randomised, rows, small
from tests.training.tiny import run, tiny_config

PLAIN = small(num_layers=4, retro={"cca_layers": (2, 4)})
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "linear_bias": False, "num_heads": 4, "num_kv_heads": 2}
FORMS = {
    "GPT, biases": PLAIN,
    "learned positions, scanned stacks": small(num_layers=6, positions="learned", retro={"cca_layers": (2, 4, 6)}),
    "Llama": small(num_layers=3, tied_embedding=False, retro={"cca_layers": (1, 3)}, **LLAMA),
    "learned gate": small(num_layers=3, retro={"cca_layers": (3,), "gate": "learned"}),
    "all that helps a small Retro": small(
        retro={"cca_layers": (2,), "cca_init": "copy", "conv_width": 2, "null_key": 2.0}, encoder={"embedding": "own"}
    ),
}


def as_folder(config: ModelConfig, path: Path) -> str:
    """A model of random numbers as a folder of ours."""
    arrays: dict[Any, Any] = {p: v[...] for p, v in nnx.to_flat_state(nnx.state(randomised(config), nnx.Param))}
    named = {name: take(arrays, slot) for name, slot in slots(config).items()}
    with new_folder(path) as folder:
        write_checkpoint("retro", folder, Opened(config, MemorySource(named), entries(config, OURS), []))
    return str(path)


def started(config: ModelConfig, start_from: str, **settings: Any) -> tuple[ModelForm, TrainState]:
    training = TrainConfig(start_from=start_from, **settings)
    form = model_form(config, is_trained(config, training.trained))
    return form, from_checkpoint(initial_state(form, optax.sgd(0.1), 0), form, training)


def logits(model: Retro) -> np.ndarray:
    """Jitted, the batch an argument, as in training; what is a constant is computed ahead by XLA, in other last bits."""
    graph, state = nnx.split(model)

    @jax.jit
    def compute(state: nnx.State, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, state)
        return jnp.einsum("btd,vd->btv", model(batch), model.output_table_VD())

    return np.asarray(compute(state, rows()))


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[] if form == "all that helps a small Retro" else pytest.mark.slow) for form in FORMS],
)
def test_a_retro_starts_as_the_gpt_bit_for_bit(form: str, tmp_path: Path) -> None:
    config = FORMS[form]
    form_, state = started(config, as_folder(gpt(config), tmp_path / "gpt"))
    retro = form_.merge(state.params, state.frozen)
    np.testing.assert_array_equal(logits(retro), logits(randomised(gpt(config))))
    _, drawn = started(config, str(tmp_path / "gpt"), new_parts="initialised")
    assert not np.array_equal(logits(form_.merge(drawn.params, drawn.frozen)), logits(retro))


def test_what_is_new_starts_as_without_a_checkpoint(tmp_path: Path) -> None:
    folder = as_folder(gpt(PLAIN), tmp_path / "gpt")
    form, state = started(PLAIN, folder, new_parts="initialised")
    fresh = by_path(initial_state(form, optax.sgd(0.1), 0).params)
    quiet = by_path(started(PLAIN, folder)[1].params)
    for path, values in by_path(state.params).items():
        assert np.array_equal(values, fresh[path]) == is_retrieval(path) or not np.any(fresh[path])
        silenced = "cca" in path and path[-2:] == ("out", "weight")
        assert np.array_equal(values, quiet[path]) != silenced and (not silenced or not np.any(quiet[path]))


def test_a_retro_starts_from_a_retro_and_a_gpt_from_its_decoder(tmp_path: Path) -> None:
    folder = as_folder(PLAIN, tmp_path / "retro")
    for config in (PLAIN, gpt(PLAIN)):
        form, state = started(config, folder)
        backbone = randomised(PLAIN)
        expected = {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(backbone, nnx.Param))}
        if config.retro is not None:
            jax.tree.map(np.testing.assert_array_equal, by_path(state.params), expected)
        else:
            model = form.merge(state.params, state.frozen)
            np.testing.assert_allclose(model(rows()), backbone(rows(), retrieval=False), atol=1e-6)


def test_a_retro_goes_on_with_its_gate(tmp_path: Path) -> None:
    """A learned gate beside trained chunked cross-attention would begin by silencing it."""
    folder = as_folder(PLAIN, tmp_path / "retro")
    assert PLAIN.retro is not None
    gated = dataclasses.replace(PLAIN, retro=dataclasses.replace(PLAIN.retro, gate="learned", neighbour_dropout=0.1))
    with pytest.raises(UserError, match=r"needs RetroConfig.gate=1.0 \(not 'learned'\)$"):
        started(gated, folder)


@pytest.mark.slow
def test_training_of_the_retrieval_alone(tmp_path: Path) -> None:
    """From a run's last checkpoint; what is frozen stays bit-equal and has no moments, what is new learns."""
    config = tiny_config(steps=2)
    plain = dataclasses.replace(config.model, retro=None)
    run(tmp_path / "gpt", dataclasses.replace(config, model=plain), model=plain)
    start = str(tmp_path / "gpt")
    assert run(tmp_path / "retro", tiny_config(steps=2, start_from=start, trained="retrieval")) == 2
    before, after = (weights(tmp_path / name) for name in ("gpt", "retro"))
    assert all(np.array_equal(after[path], values) for path, values in before.items())
    moved = {path for path, values in after.items() if path not in before and np.any(values)}
    assert {part for path in moved for part in path} >= RETRIEVAL_PARTS
    assert any(path[-2:] == ("out", "weight") for path in moved)
    shutil.rmtree(tmp_path / "gpt")  # a run that has begun needs its start no more
    longer = tiny_config(steps=3, start_from=start, trained="retrieval")
    check_run(longer, workdir_of(tmp_path))
    assert run(tmp_path / "retro", longer) == 1


def test_one_checkpoint_of_a_run(whole_run: Path) -> None:
    _, state = started(tiny_config().model, str(whole_run / "checkpoints" / "4"))
    expected = weights(whole_run, 4)
    assert all(np.array_equal(values, expected[path]) for path, values in by_path(state.params).items())


def test_a_checkpoint_that_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    folder = as_folder(gpt(PLAIN), tmp_path / "gpt")
    other = dataclasses.replace(PLAIN, vocab_size=None, ffn_dim=40, norm="rmsnorm", dropout=0.1, num_kv_heads=2, max_positions=99)
    with pytest.raises(
        UserError, match=r"needs ModelConfig.ffn_dim=24 \(not 40\), ModelConfig.norm='layernorm' \(not 'rmsnorm'\)$"
    ):
        check_run(of_run(other, folder), tmp_path)
    check_run(of_run(dataclasses.replace(PLAIN, vocab_size=None), folder), tmp_path)
    with pytest.raises(UserError, match=r"ModelConfig.vocab_size=64 \(not 128\)"):
        started(dataclasses.replace(PLAIN, vocab_size=128), folder)
    with pytest.raises(UserError, match=r"start_from='.*nowhere' is not there"):
        check_run(of_run(PLAIN, str(tmp_path / "nowhere")), tmp_path)
    with pytest.raises(UserError, match=r"holds neither checkpoints/, .* nor config.json"):
        check_run(of_run(PLAIN, str(tmp_path)), tmp_path)
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "megatron-core"}')
    with pytest.raises(UserError, match="make it ours first: python -m retro_jax convert --from megatron-core --to retro"):
        check_run(of_run(PLAIN, folder), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained": "retrieval"}, "freezes an untrained decoder; set start_from"),
        ({"start_from": "gpt", "baselines": ("gpt_matched",)}, "wider than that of start_from"),
        ({"start_from": "gpt", "trained": "retrieval", "baselines": ("gpt",)}, "leaves nothing of them to train"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_nothing_to_train_without_retrieval() -> None:
    config = tiny_config(start_from="gpt", trained="retrieval")
    with pytest.raises(ValueError, match="trains nothing of a model without retrieval"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, retro=None))


def of_run(model: ModelConfig, start_from: str) -> Config:
    assert model.retro is not None
    training = TrainConfig(start_from=start_from)
    return dataclasses.replace(tiny_config(), chunks=model.retro.chunks, model=model, training=training)


def workdir_of(folder: Path) -> Path:
    """The workdir whose only model lies in ``folder``/retro."""
    models = folder / "models"
    models.mkdir()
    (models / "retro").symlink_to(folder / "retro")
    return folder


def weights(folder: Path, which: str | int = "latest") -> dict[Any, np.ndarray]:
    model, _ = load_model(folder, which)
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def by_path(tree: Any) -> dict[Any, jax.Array]:
    return {tuple(key.key for key in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}
