"""One step: its loss, its gradient, accumulation, precision, dropout."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.config import Config, TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.training.optimizer import is_trained, make_optimizer
from retro_jax.training.state import ModelForm, TrainState, initial_state, model_form, names
from retro_jax.training.step import StepMetrics, dropout_seed, make_train_step, make_valid_step
from tests.training.tiny import random_batch, tiny_config


def without_dropout(**settings: object) -> Config:
    config = tiny_config(**settings)
    assert config.model.retro is not None
    retro = dataclasses.replace(config.model.retro, neighbour_dropout=0.0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0, retro=retro))


def gpt(*, dropout: float = 0.0, **settings: object) -> Config:
    """Where retrieval does not matter: compiled in a third of the time."""
    config = tiny_config(**settings)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=dropout, retro=None))


@functools.cache
def prepared(config: Config) -> tuple[ModelForm, object, TrainState]:
    form = model_form(config.model, is_trained(config.model))
    optimizer = make_optimizer(config.optimizer, config.training.steps, form.trained)
    return form, optimizer, initial_state(form, optimizer, config.training.seed)


def step(config: Config, batch: Batch, state: TrainState | None = None) -> tuple[TrainState, StepMetrics]:
    form, optimizer, initial = prepared(config)
    return jax.jit(make_train_step(form, optimizer, config.training))(initial if state is None else state, batch)  # type: ignore[arg-type]


def naive_loss(config: Config, params: dict, batch: Batch) -> jax.Array:
    form = prepared(config)[0]
    model = form.merge(params, {})
    logits = jnp.einsum("btd,vd->btv", model(jax.tree.map(jnp.asarray, batch)), model.output_table_VD())
    losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, jnp.asarray(batch.targets)[..., None], -1)[..., 0]
    return jnp.sum(losses * batch.loss_mask) / jnp.sum(batch.loss_mask)


def test_loss_and_gradient_norm_are_those_of_the_mean_over_the_targets() -> None:
    config, batch = without_dropout(), random_batch(1)[0]
    _, metrics = step(config, batch)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: naive_loss(config, p, batch)))(prepared(config)[2].params)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    assert metrics.targets == batch.loss_mask.sum()


def test_the_z_loss_is_minimised_and_not_reported() -> None:
    batch, weight = random_batch(4)[0], 0.1
    config = gpt(z_loss=weight, accumulate=2)

    def minimised(params: dict) -> jax.Array:
        model = prepared(config)[0].merge(params, {})
        logits = jnp.einsum("btd,vd->btv", model(jax.tree.map(jnp.asarray, batch)), model.output_table_VD())
        squares = jnp.sum(jax.nn.logsumexp(logits, -1) ** 2 * batch.loss_mask) / jnp.sum(batch.loss_mask)
        return naive_loss(config, params, batch) + weight * squares

    _, metrics = step(config, batch)
    params = prepared(config)[2].params
    np.testing.assert_allclose(metrics.loss, naive_loss(config, params, batch), rtol=1e-6)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(jax.jit(jax.grad(minimised))(params))))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    assert abs(norm / float(step(gpt(accumulate=2), batch)[1].grad_norm) - 1.0) > 0.05


def test_accumulated_steps_equal_the_undivided_batch() -> None:
    batch = random_batch(2, rows=8)[0]
    # Parts of very different sizes: a mean of means would differ.
    mask = batch.loss_mask.copy()
    mask[::2] = 0.0
    mask[0, 0] = 1.0
    batch = batch._replace(loss_mask=mask)
    whole_state, whole = step(gpt(), batch)
    state, metrics = step(gpt(accumulate=4), batch)
    np.testing.assert_allclose(metrics.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, whole.grad_norm, rtol=1e-5)
    assert metrics.targets == whole.targets
    # Adam divides by the gradient's size, so a rounded zero may move by the rate; compare its first moment.
    for moment, want in zip(jax.tree.leaves(state.moments[1].mu), jax.tree.leaves(whole_state.moments[1].mu), strict=True):
        np.testing.assert_allclose(moment, want, rtol=1e-4, atol=1e-8)  # measured 2e-9


def test_every_trained_parameter_gets_a_gradient_and_no_other_changes() -> None:
    for gate in (1.0, 0.0):
        config = without_dropout()
        retro = dataclasses.replace(config.model.retro, gate=gate)  # type: ignore[type-var]
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, retro=retro))
        before = prepared(config)[2]
        after, _ = step(config, random_batch(1)[0])
        for name, old, new in zip(
            names(before.params), jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True
        ):
            assert (np.asarray(old) != np.asarray(new)).any(), name
        for name, old, new in zip(
            names(before.frozen), jax.tree.leaves(before.frozen), jax.tree.leaves(after.frozen), strict=True
        ):
            np.testing.assert_array_equal(old, new, err_msg=name)
        assert bool(names(before.frozen)) == (gate == 0.0)


def test_dropout_depends_on_seed_and_step_alone() -> None:
    batch = random_batch(1)[0]
    config = gpt(dropout=0.1)
    initial = prepared(config)[2]
    first, again = step(config, batch)[1], step(config, batch)[1]
    later = step(config, batch, initial._replace(step=jnp.int32(1)))[1]
    assert first.loss == again.loss != later.loss
    keys = [jax.random.key_data(dropout_seed(TrainConfig(seed=seed))).tolist() for seed in (0, 1)]
    assert keys[0] != keys[1] and keys[0] != jax.random.key_data(jax.random.key(0)).tolist()


def test_bfloat16_keeps_float32_weights_and_comes_close_to_float32() -> None:
    batch = random_batch(1)[0]
    state, metrics = step(gpt(precision="bfloat16"), batch)
    _, exact = step(gpt(precision="float32"), batch)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state))
    assert metrics.loss != exact.loss
    np.testing.assert_allclose(metrics.loss, exact.loss, rtol=5e-3)  # measured 3e-4
    np.testing.assert_allclose(metrics.grad_norm, exact.grad_norm, rtol=5e-2)  # measured 5e-3


@pytest.mark.parametrize("chunk", [2048, 10])
def test_validation_sums_the_losses_of_the_targets_without_dropout(chunk: int) -> None:
    config, batch = gpt(dropout=0.1, loss_chunk=chunk), random_batch(3)[0]
    form, _, state = prepared(config)
    total, targets = jax.jit(make_valid_step(form, config.training))(state.params, state.frozen, batch)
    np.testing.assert_allclose(total / targets, naive_loss(config, state.params, batch), rtol=1e-6)
    assert targets == batch.loss_mask.sum()


def test_a_batch_without_targets_changes_nothing_but_the_decay() -> None:
    batch = random_batch(1)[0]
    _, metrics = step(gpt(), batch._replace(loss_mask=np.zeros_like(batch.loss_mask)))
    assert metrics.loss == 0.0 and metrics.grad_norm == 0.0 and metrics.targets == 0.0
