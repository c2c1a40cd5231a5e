"""What is saved is restored; what does not fit or is broken is refused in one sentence."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.config import Config, ModelConfig, resolved
from retro_jax.errors import UserError
from retro_jax.field_types import config_from_plain
from retro_jax.training.checkpoint import About, Checkpoints, load_model
from retro_jax.training.optimizer import is_trained, make_optimizer
from retro_jax.training.resume import differences
from retro_jax.training.state import TrainState, abstract_state, digests, initial_state, model_form, row_digest
from tests.training.tiny import run, tiny_batches, tiny_config

CONFIG = tiny_config()


def about(step: int, valid_loss: float | None = None) -> About:
    return About(
        step=step,
        valid_loss=valid_loss,
        model=resolved(CONFIG.model),
        settings=resolved(CONFIG),
        config_text="",
        data={},
        progress={},
    )


@pytest.fixture(scope="module")
def state(compiled: None) -> tuple[TrainState, TrainState]:
    """A state and its shapes."""
    form = model_form(CONFIG.model, is_trained(CONFIG.model))
    optimizer = make_optimizer(CONFIG.optimizer, 12, form.trained)
    return initial_state(form, optimizer, 0), abstract_state(form, optimizer)


@pytest.fixture
def copied(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, to be broken."""
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def among_the_numbers(data: bytes) -> int:
    """A place in a file's numbers: they stand first; the index that follows has nodes that nothing reads any more."""
    return len(data) // 16


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[among_the_numbers(data)] ^= 0x10
    path.write_bytes(bytes(data))


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_state_and_place_in_the_data_come_back(tmp_path: Path, state: tuple[TrainState, TrainState]) -> None:
    batches = tiny_batches()
    for _ in range(3):
        next(batches)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(state[0]._replace(step=jnp.int32(3)), batches, about(3))
        following = [next(batches)[1].tolist() for _ in range(2)]
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        fresh = tiny_batches()
        restored = checkpoints.restore(3, state[1], fresh)
        assert [next(fresh)[1].tolist() for _ in range(2)] == following
        assert config_from_plain(ModelConfig, checkpoints.about(3).model) == CONFIG.model
        assert config_from_plain(Config, checkpoints.about(3).settings) == CONFIG
    assert restored.step == 3
    assert jax.tree.structure(restored) == jax.tree.structure(state[0])
    for old, new in zip(jax.tree.leaves(state[0])[1:], jax.tree.leaves(restored)[1:], strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(old, new)


def test_a_save_under_way_does_not_see_the_steps_after_it(tmp_path: Path) -> None:
    """Large enough that a save takes longer than a step; the state is given away (donated) at once."""
    params = {"w": jnp.arange(4_000_000, dtype=jnp.float32), "v": jnp.ones((1000, 1000), jnp.float32)}
    state = TrainState(jnp.int32(0), params, {}, ())
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path / "c", keep=9) as checkpoints:
        for number in range(1, 4):
            state = step(state)
            checkpoints.save(state, tiny_batches(), about(number))
            for _ in range(3):
                state = step(state)
            state = jax.tree.map(lambda x: x - 3, state)
        for number in (1, 2, 3):
            checkpoints.wait()
            restored = checkpoints.restore(number, jax.eval_shape(lambda: state), tiny_batches())
            np.testing.assert_array_equal(restored.params["w"][:3], np.arange(3) + number)
            assert restored.params["v"].min() == restored.params["v"].max() == 1 + number


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path, state: tuple[TrainState, TrainState]) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: None}
    kept = {}
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest is None and checkpoints.best is None
        for step, loss in losses.items():
            checkpoints.save(state[0], tiny_batches(), about(step, loss))
            checkpoints.wait()
            kept[step] = checkpoints.steps
    assert kept == {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6]}
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:  # what was best is known again after a restart
        assert (checkpoints.find("latest"), checkpoints.find("best"), checkpoints.find(5)) == (6, 2, 5)
        checkpoints.save(state[0], tiny_batches(), about(7, 0.5))
        checkpoints.save(state[0], tiny_batches(), about(8, 0.7))
        checkpoints.wait()
        assert checkpoints.steps == [7, 8] and checkpoints.best == 7
        with pytest.raises(UserError, match="no checkpoint 2 in .*: there are 7, 8"):
            checkpoints.find("2")
        with pytest.raises(UserError, match="no checkpoint newest in"):
            checkpoints.find("newest")


def test_the_model_of_a_checkpoint_is_loaded(whole_run: Path) -> None:
    model, step = load_model(whole_run)
    assert step == 12 and model.config == CONFIG.model
    earlier, at = load_model(whole_run, "best")
    assert at == 4  # random targets: the validation loss only rises, and step 2 was no checkpoint
    assert (model.output_table_VD() != earlier.output_table_VD()).any()
    with pytest.raises(UserError, match=r"no checkpoint 5 in .*: there are 4, 8, 12"):
        load_model(whole_run, 5)
    with pytest.raises(UserError, match="is not there; train the model first"):
        load_model(whole_run / "nowhere")


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_a_flipped_bit_is_found_and_the_last_good_one_named(copied: Path, item: str) -> None:
    spoil(largest(copied / "checkpoints" / "12" / item))
    shutil.rmtree(copied / "checkpoints" / "4", ignore_errors=True)
    with pytest.raises(
        UserError, match=r"checkpoints/12 is corrupted \(.*\); delete it to continue from step 8, the last good one"
    ):
        run(copied, tiny_config(steps=14))
    assert len((copied / "metrics.jsonl").read_text().splitlines()) > 5  # nothing was dropped


def test_numbers_that_change_behind_the_format_are_found(copied: Path) -> None:
    """The digests, where every checksum of the format would pass: another checkpoint's numbers under this one's name."""
    for item in ("params", "optimizer"):
        shutil.rmtree(copied / "checkpoints" / "12" / item)
        shutil.copytree(copied / "checkpoints" / "8" / item, copied / "checkpoints" / "12" / item)
    with pytest.raises(UserError, match="corrupted .the numbers of .* have changed.*step 8"):
        run(copied, tiny_config(steps=14))


@pytest.mark.parametrize("broken", ["truncated", "about", "batches"])
def test_a_broken_checkpoint_is_refused(copied: Path, broken: str) -> None:
    folder = copied / "checkpoints" / "12"
    if broken == "truncated":
        path = largest(folder / "params")
        data = path.read_bytes()
        path.write_bytes(data[: among_the_numbers(data)])
    elif broken == "about":
        (folder / "about" / "metadata").write_text("{")
    else:
        next((folder / "batches").glob("process*.json")).write_text("nothing")
    with pytest.raises(UserError, match="checkpoints/12 is corrupted.*step 8, the last good one"):
        run(copied, tiny_config(steps=14))


def test_where_no_other_is_good_the_message_says_so(copied: Path) -> None:
    for step in (4, 8):
        shutil.rmtree(copied / "checkpoints" / str(step), ignore_errors=True)
    spoil(largest(copied / "checkpoints" / "12" / "params"))
    with pytest.raises(UserError, match="no earlier one is good; delete .* to train anew"):
        run(copied, tiny_config(steps=14))


def changed(config: Config, **settings: object) -> Config:
    return dataclasses.replace(config, **settings)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_model_or_other_batches_is_refused(copied: Path) -> None:
    config = tiny_config(steps=14)
    wider = dataclasses.replace(config.model, width=32)
    with pytest.raises(UserError, match=r"checkpoints/12 was trained with ModelConfig.width=16, now ModelConfig.width=32"):
        run(copied, changed(config, model=wider))
    with pytest.raises(UserError, match=r"ModelConfig.retro=\{.*now ModelConfig.retro=None"):
        run(copied, config, model=dataclasses.replace(config.model, retro=None))
    with pytest.raises(UserError, match="DataConfig.batch_size=4, now DataConfig.batch_size=8"):
        run(copied, changed(config, data=dataclasses.replace(config.data, batch_size=8)))


def test_parameters_of_another_shape_are_named(copied: Path) -> None:
    """A model whose code has changed since: the settings are the same."""
    with Checkpoints(copied / "checkpoints", keep=2) as checkpoints:
        wider = dataclasses.replace(CONFIG.model, ffn_dim=48)
        form = model_form(wider, is_trained(wider))
        other = abstract_state(form, make_optimizer(CONFIG.optimizer, 12, form.trained))
        with pytest.raises(
            UserError, match=r"is of another model: decoder.*ffn.* has shape \(.*64.*\) there and has shape \(.*48.*\)"
        ):
            checkpoints.restore(12, other, tiny_batches())
        gpt = dataclasses.replace(CONFIG.model, retro=None)
        form = model_form(gpt, is_trained(gpt))
        other = abstract_state(form, make_optimizer(CONFIG.optimizer, 12, form.trained))
        with pytest.raises(UserError, match=r"decoder.*cca.* has shape .* there and is not in this model"):
            checkpoints.restore(12, other, tiny_batches())


def test_settings_that_matter_differ_and_others_do_not() -> None:
    old, new = resolved(CONFIG.model), resolved(dataclasses.replace(CONFIG.model, implementation="reference", dropout=0.3))
    assert differences(ModelConfig, old, new) == [("ModelConfig.dropout", 0.1, 0.3)]
    encoder = dataclasses.replace(CONFIG.model.retro.encoder, num_layers=3)  # type: ignore[union-attr]
    nested = dataclasses.replace(CONFIG.model, retro=dataclasses.replace(CONFIG.model.retro, encoder=encoder))  # type: ignore[type-var]
    assert differences(ModelConfig, old, resolved(nested)) == [("EncoderConfig.num_layers", 1, 3)]
    older = {name: value for name, value in old.items() if name != "rotary_scale"}  # a version that did not know it
    assert differences(ModelConfig, older, old) == []
    scaled = resolved(dataclasses.replace(CONFIG.model, rotary_scale=2.0))
    assert differences(ModelConfig, older, scaled) == [("ModelConfig.rotary_scale", 1.0, 2.0)]


def test_a_config_comes_back_from_its_plain_values() -> None:
    assert config_from_plain(Config, resolved(CONFIG)) == CONFIG
    with pytest.raises(TypeError, match="ModelConfig has no depth"):
        config_from_plain(ModelConfig, {"depth": 3})


def test_a_digest_changes_with_every_bit_and_every_exchange() -> None:
    random = np.random.default_rng(0)
    array = random.normal(size=(5, 7)).astype(np.float32)
    (digest,) = digests([jnp.asarray(array)])
    for place in range(35):
        for bit in range(0, 32, 5):
            bits = array.view(np.uint32).copy()
            bits.flat[place] ^= np.uint32(1 << bit)
            assert digests([jnp.asarray(bits.view(np.float32))])[0] != digest, (place, bit)
    exchanged = array.copy()
    exchanged[0, 0], exchanged[3, 2] = array[3, 2], array[0, 0]
    assert digests([jnp.asarray(exchanged)])[0] != digest
    assert digests([jnp.asarray(array.T.copy().reshape(5, 7))])[0] != digest


@pytest.mark.parametrize("shape", [(4, 3, 5), (6,), (1, 2)])
def test_a_digest_is_the_sum_of_its_rows(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    rows = [int(row_digest(row, np.uint32(number))) for number, row in enumerate(array)]
    assert sum(rows) % 2**32 == int(digests([jnp.asarray(array)])[0])
