"""One step of training and of validation: pure functions of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from retro_jax.config import TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.parallel.axes import batch_index
from retro_jax.parallel.layout import Layout
from retro_jax.training.capacity import num_places
from retro_jax.training.loss import loss_and_cross_entropy, token_losses
from retro_jax.training.state import ModelForm, TrainState, Tree


class StepMetrics(NamedTuple):
    """Scalars of one step: float32 ``loss`` (mean over the targets, nats, without the z-loss) and ``grad_norm`` (before
    clipping), float32 ``targets`` (how many)."""

    loss: jax.Array
    grad_norm: jax.Array
    targets: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
ValidStep = Callable[[Tree, Tree, Batch], tuple[jax.Array, jax.Array]]


def make_train_step(
    form: ModelForm, optimizer: optax.GradientTransformation, config: TrainConfig, layout: Layout | None = None
) -> TrainStep:
    """(state, batch) -> (next state, metrics); to be jitted with the state donated.

    The loss is the sum of token losses times ``loss_mask`` over the sum of the mask; what is minimised has the z-loss beside.
    With ``accumulate`` parts the batch's rows are dealt to the parts in turn and the gradients of the parts are summed in
    float32; every part counts its targets as shares of the whole batch's, so that the sum is the gradient of the undivided
    batch. Dropout depends on seed, step and a token's place in the batch alone.

    Args:
        form: the model's.
        optimizer: of its trained parameters.
        config: precision, accumulation, seed, z-loss, capacity.
        layout: of the devices that share the step; None: one does it alone. Gradients are summed over devices once a step.
            Where it gathers the parameters once, all parts compute with whole ones and sum whole gradients.
    """
    dtype = compute_dtype(config)
    gathers_once = layout is not None and layout.gathers_once
    how = form.config.implementation
    losses = partial(loss_and_cross_entropy, chunk=config.loss_chunk, z_loss=config.z_loss, implementation=how)

    def loss_of(
        params: Tree, frozen: Tree, batch: Batch, weights_BT: jax.Array, rows_B: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What is minimised, and what is reported."""
        model = form.merge(cast(params, dtype), cast(frozen, dtype))
        places = num_places(config, *batch.neighbours.shape[:2])
        hidden_BTD = model(batch, dropout_key=key, row_numbers_B=rows_B, places=places)
        table_VD = form.merge(params, frozen).output_table_VD()  # float32: its gradient is summed over chunks in float32
        return losses(hidden_BTD, table_VD, batch.targets, weights_BT)

    def gradients(params: Tree, frozen: Tree, batch: Batch, step: jax.Array) -> tuple[jax.Array, jax.Array, Tree]:
        """Loss, number of targets, and the gradient of ``params``; on a mesh those of the whole batch from this device's part."""
        targets = jnp.sum(batch.loss_mask)
        if layout is not None:
            targets = layout.sum_over_batch(targets)
        weights_BT = batch.loss_mask / jnp.maximum(targets, 1.0)
        rows = batch.tokens.shape[0]
        rows_B = (batch_index() * rows + jnp.arange(rows)).astype(jnp.uint32)
        key = jax.random.fold_in(dropout_seed(config), step)

        if layout is not None and gathers_once:
            # All parameters over fsdp in the dtype of the computation, once a step: (f - 1) / f of them.
            params, frozen = layout.gather((cast(params, dtype), cast(frozen, dtype)), specs)

        def of_part(part: Batch, weights_BT: jax.Array, rows_B: jax.Array) -> tuple[jax.Array, Tree]:
            # Of float32 parameters the gradient is float32. What was cast before the gather is the same when it is cast again.
            wide = cast(params, jnp.dtype("float32")) if gathers_once else params
            (_, reported), gradient = jax.value_and_grad(loss_of, has_aux=True)(wide, frozen, part, weights_BT, rows_B, key)
            return reported, gradient

        if config.accumulate == 1:
            loss, gradient = of_part(batch, weights_BT, rows_B)
        else:
            loss, gradient = _accumulate(of_part, (batch, weights_BT, rows_B), config.accumulate, params)
        if layout is not None:
            loss = layout.sum_over_batch(loss)
            if gathers_once:
                # The sums of all parts in float32, into each device's shards: (f - 1) / f of them, once a step.
                gradient = layout.sum_into_shards(gradient, specs[0])
            leaves, tree = jax.tree.flatten(gradient)
            gradient = jax.tree.unflatten(tree, layout.sum_gradients(leaves, jax.tree.leaves(specs[0])))
        return loss, targets, gradient

    if layout is not None:
        specs = form.specs(layout)
        gradients = layout.run(gradients, (*specs, layout.batch, P()), (P(), P(), specs[0]))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        loss, targets, gradient = gradients(state.params, state.frozen, batch, state.step)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, moments = optimizer.update(gradient, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(loss, optax.tree.norm(gradient), targets)
        return TrainState(state.step + 1, params, state.frozen, moments), metrics

    return train_step


def make_valid_step(form: ModelForm, config: TrainConfig, layout: Layout | None = None) -> ValidStep:
    """(params, frozen, batch) -> (sum of token losses over the targets, number of targets), without dropout."""
    dtype = compute_dtype(config)

    def valid_step(params: Tree, frozen: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden_BTD = form.merge(cast(params, dtype), cast(frozen, dtype))(batch)
        table_VD = form.merge(params, frozen).output_table_VD()
        losses_BT = token_losses(
            hidden_BTD, table_VD, batch.targets, chunk=config.loss_chunk, implementation=form.config.implementation
        )
        sums = jnp.sum(losses_BT * batch.loss_mask), jnp.sum(batch.loss_mask)
        return sums if layout is None else layout.sum_over_batch(sums)

    if layout is None:
        return valid_step
    return layout.run(valid_step, (*form.specs(layout), layout.batch), (P(), P()))


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
    gradients: Callable[..., tuple[jax.Array, Tree]], whole: tuple[Batch, jax.Array, jax.Array], count: int, params: Tree
) -> tuple[jax.Array, Tree]:
    def deal(array: jax.Array) -> jax.Array:
        return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)

    def add(sums: tuple[jax.Array, Tree], part: tuple[Batch, jax.Array, jax.Array]) -> tuple[tuple[jax.Array, Tree], None]:
        return jax.tree.map(jnp.add, sums, gradients(*part)), None

    nothing = (jnp.zeros((), jnp.float32), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    return jax.lax.scan(add, nothing, jax.tree.map(deal, whole))[0]
