"""One step of training and of validation: pure functions of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from retro_jax.config import TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.training.loss import token_losses, weighted_loss
from retro_jax.training.state import ModelForm, TrainState, Tree


class StepMetrics(NamedTuple):
    """Scalars of one step: float32 ``loss`` (mean over the targets, nats) and ``grad_norm`` (before clipping), float32
    ``targets`` (how many)."""

    loss: jax.Array
    grad_norm: jax.Array
    targets: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
ValidStep = Callable[[Tree, Tree, Batch], tuple[jax.Array, jax.Array]]


def make_train_step(form: ModelForm, optimizer: optax.GradientTransformation, config: TrainConfig) -> TrainStep:
    """(state, batch) -> (next state, metrics); to be jitted with the state donated.

    The loss is the sum of token losses times ``loss_mask`` over the sum of the mask. With ``accumulate`` parts the batch's rows
    are dealt to the parts in turn and the gradients of the parts are summed in float32; every part counts its targets as
    shares of the whole batch's, so that the sum is the gradient of the undivided batch. Dropout keys depend on seed, step and
    part alone.
    """
    dtype = compute_dtype(config)

    def loss_of(params: Tree, frozen: Tree, batch: Batch, weights_BT: jax.Array, key: jax.Array) -> jax.Array:
        hidden_BTD = form.merge(cast(params, dtype), cast(frozen, dtype))(batch, dropout_key=key)
        table_VD = form.merge(params, frozen).output_table_VD()  # float32: its gradient is summed over chunks in float32
        return weighted_loss(hidden_BTD, table_VD, batch.targets, weights_BT, chunk=config.loss_chunk)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        targets = jnp.sum(batch.loss_mask)
        weights_BT = batch.loss_mask / jnp.maximum(targets, 1.0)
        key = jax.random.fold_in(dropout_seed(config), state.step)

        def gradients(part: Batch, weights: jax.Array, number: jax.Array | int) -> tuple[jax.Array, Tree]:
            return jax.value_and_grad(loss_of)(state.params, state.frozen, part, weights, jax.random.fold_in(key, number))

        if config.accumulate == 1:
            loss, gradient = gradients(batch, weights_BT, 0)
        else:
            loss, gradient = _accumulate(gradients, batch, weights_BT, config.accumulate, state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, moments = optimizer.update(gradient, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(loss, optax.tree.norm(gradient), targets)
        return TrainState(state.step + 1, params, state.frozen, moments), metrics

    return train_step


def make_valid_step(form: ModelForm, config: TrainConfig) -> ValidStep:
    """(params, frozen, batch) -> (sum of token losses over the targets, number of targets), without dropout."""
    dtype = compute_dtype(config)

    def valid_step(params: Tree, frozen: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden_BTD = form.merge(cast(params, dtype), cast(frozen, dtype))(batch)
        table_VD = form.merge(params, frozen).output_table_VD()
        losses_BT = token_losses(hidden_BTD, table_VD, batch.targets, chunk=config.loss_chunk)
        return jnp.sum(losses_BT * batch.loss_mask), jnp.sum(batch.loss_mask)

    return valid_step


def compute_dtype(config: TrainConfig) -> jnp.dtype:
    """What the model computes in: as ``precision`` says; "auto" is bfloat16 on accelerators and float32 on CPU."""
    if config.precision == "auto":
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return jnp.dtype(config.precision)


def cast(params: Tree, dtype: jnp.dtype) -> Tree:
    """Every parameter in the dtype of the computation."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


def dropout_seed(config: TrainConfig) -> jax.Array:
    """The key that the steps' dropout keys are folded from; another than the parameters'."""
    return jax.random.fold_in(jax.random.key(config.seed), 1)


def _accumulate(
    gradients: Callable[[Batch, jax.Array, jax.Array], tuple[jax.Array, Tree]],
    batch: Batch,
    weights_BT: jax.Array,
    count: int,
    params: Tree,
) -> tuple[jax.Array, Tree]:
    def deal(array: jax.Array) -> jax.Array:
        return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)

    def add(sums: tuple[jax.Array, Tree], part: tuple[Batch, jax.Array, jax.Array]) -> tuple[tuple[jax.Array, Tree], None]:
        return jax.tree.map(jnp.add, sums, gradients(*part)), None

    nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    parts = (*jax.tree.map(deal, (batch, weights_BT)), jnp.arange(count))
    return jax.lax.scan(add, nothing, parts)[0]
