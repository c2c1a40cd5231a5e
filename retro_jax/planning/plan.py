"""What one training step costs on each device of a mesh, counted without any device: bytes held, operations, bytes received.

Parameters, gradients, moments and what the forward pass saves are the arrays of the program that would run. The workspace is an
estimate: of the arrays that live for a moment only, the largest set that is known of.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from retro_jax.config import Config, ModelConfig, TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.parallel.axes import AXES, TENSOR
from retro_jax.parallel.layout import Layout
from retro_jax.planning.program import Collective, SavedBytes, collectives, product_flops, saved_inside
from retro_jax.planning.target import Target
from retro_jax.training.flops import train_flops
from retro_jax.training.loss import weighted_loss
from retro_jax.training.optimizer import is_trained, make_optimizer
from retro_jax.training.state import ModelForm, Tree, abstract_state, divided_params, model_form
from retro_jax.training.step import make_train_step

# Bytes of a logit while its chunk of the loss is computed: the logit and its exponential in float32, its gradient in bfloat16.
LOGIT_BYTES = 4 + 4 + 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step of a model on a mesh, for each device.

    ``memory``: bytes by kind. ``offloaded``: saved bytes that lie in the host's memory. ``model_flops``: of the model's own
    matrix products, this device's share; ``hardware_flops``: of all products that it computes, also those computed again.
    ``exchanges``: what it receives. ``parameters``: how many the model has. ``checkpoint``: bytes of a whole checkpoint.
    """

    config: Config
    model: ModelConfig
    memory: dict[str, int]
    offloaded: int
    model_flops: float
    hardware_flops: int
    exchanges: tuple[Collective, ...]
    parameters: int
    checkpoint: int

    @property
    def total_memory(self) -> int:
        """Bytes on the device."""
        return sum(self.memory.values())

    def received(self, axis: str) -> int:
        """Bytes that reach the device in a step by exchanges of which this axis is the outermost."""
        return sum(e.received * e.times for e in self.exchanges if min(e.axes, key=AXES.index) == axis)

    def seconds(self, target: Target) -> dict[str, float]:
        """What a step would take by each limit alone: products, the device's memory, and the links of each axis."""
        memory = self.memory
        # The optimizer reads and writes its own once; each part reads the copy twice and writes and reads what is saved.
        moved = 2 * (memory["optimizer"] + memory["parameters"] + memory["gradients"]) + memory["compute copy"]
        each = 2 * sum(memory[kind] for kind in ("compute copy", "decoder activations", "retrieval activations", "loss"))
        moved += self.config.training.accumulate * each
        times = {"products": self.hardware_flops / target.flops, "memory": moved / target.bandwidth}
        reach = 1
        for axis in reversed(AXES):
            reach *= getattr(self.config.mesh, axis)
            if received := self.received(axis):
                link = target.within_host if reach <= target.devices_a_host else target.between_hosts
                times[f"links of {axis}"] = received / link
        return times


def make_plan(config: Config, model: ModelConfig) -> Plan:
    """Count one step.

    Args:
        config: batch, rows, mesh and optimizer; it computes in bfloat16 unless ``TrainConfig.precision`` is "float32".
        model: with ``vocab_size``.

    Raises:
        UserError: the mesh does not divide the model.
    """
    dtype = "float32" if config.training.precision == "float32" else "bfloat16"
    training = dataclasses.replace(config.training, precision=dtype)  # type: ignore[arg-type]
    layout = abstract_layout(config)
    form = model_form(model, is_trained(model, training.trained))
    optimizer = make_optimizer(config.optimizer, training.steps, form.trained)
    state, batch = abstract_state(form, optimizer, layout), abstract_batch(config, model, layout)
    step = jax.make_jaxpr(make_train_step(form, optimizer, training, layout))(state, batch)
    part = abstract_batch(config, model, layout, parts=training.accumulate)
    saved = _saved(model, training, layout, part)
    decoder = _saved(dataclasses.replace(model, retro=None), training, layout, part)
    memory = {
        **_held(form, training, optimizer, layout),
        "decoder activations": decoder.device,
        "retrieval activations": saved.device - decoder.device,
        "loss": _saved_by_loss(model, training, layout, part),
        "workspace": _workspace(model, training, layout, part, saved),
    }
    (rows, length), neighbours = batch.tokens.shape, batch.neighbours.shape[2]
    return Plan(
        config=config,
        model=model,
        memory=memory,
        offloaded=saved.host,
        model_flops=train_flops(model, rows=rows, seq_len=length, neighbours=neighbours) / config.mesh.devices,
        hardware_flops=product_flops(step),
        exchanges=tuple(collectives(step)),
        parameters=sum(prod(fact.shape) for fact in form.facts.values()),
        checkpoint=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
    )


def held_bytes(config: Config, model: ModelConfig) -> int:
    """What a device holds that no recomputation changes: parameters, gradients, moments and the copy to compute with.

    Raises:
        UserError: the mesh does not divide the model.
    """
    form = model_form(model, is_trained(model, config.training.trained))
    optimizer = make_optimizer(config.optimizer, config.training.steps, form.trained)
    return sum(_held(form, config.training, optimizer, abstract_layout(config)).values())


def _held(form: ModelForm, training: TrainConfig, optimizer: optax.GradientTransformation, layout: Layout) -> dict[str, int]:
    state = abstract_state(form, optimizer, layout)
    parameters = _bytes_here((state.params, state.frozen))
    return {
        "parameters": parameters,
        "gradients": _bytes_here(state.params),
        "optimizer": _bytes_here(state.moments),
        "compute copy": 0 if training.precision == "float32" else parameters // 2,
    }


def abstract_layout(config: Config) -> Layout:
    """The layout of a config on devices that need not be there."""
    sizes = tuple(getattr(config.mesh, axis) for axis in AXES)
    return Layout(config.mesh, AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES)))


def abstract_batch(config: Config, model: ModelConfig, layout: Layout, *, parts: int = 1) -> Batch:
    """Shapes, dtypes and division of a training batch, or of one of ``parts`` that it is accumulated in."""
    B, T, chunks = config.data.batch_size // parts, config.data.seq_len, config.chunks
    K = chunks.num_neighbours if model.retro is not None and model.retro.gate != 0.0 else 0
    neighbours = (B, T // chunks.chunk_len, K, chunks.retrieved_len)
    shapes = Batch(*(((B, T), np.int32),) * 4, ((B, T), np.float32), (neighbours, np.int32), (neighbours, np.bool_))
    places = layout.batch
    return Batch(
        *(
            jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(place))
            for (shape, dtype), place in zip(shapes[:7], places[:7], strict=True)
        )
    )


def _saved(model: ModelConfig, training: TrainConfig, layout: Layout, batch: Batch) -> SavedBytes:
    """What one device's forward pass up to the hidden states saves, beside parameters in the dtype of the computation."""
    form = model_form(model, is_trained(model))
    dtype = jnp.dtype(training.precision)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype, sharding=p.sharding), divided_params(form, layout)[0])

    def residuals(params: Tree, batch: Batch) -> list[jax.Array]:
        forward = jax.vjp(lambda params: form.merge(params, {})(batch, dropout_key=jax.random.key(0)), params)
        return jax.tree.leaves(forward[1])

    return saved_inside(jax.make_jaxpr(layout.run(residuals, (form.specs(layout)[0], layout.batch), P()))(params, batch))


def _saved_by_loss(model: ModelConfig, training: TrainConfig, layout: Layout, batch: Batch) -> int:
    """What the loss keeps: its gradients of hidden states and output table."""
    assert model.vocab_size is not None
    rows, chunks = layout.batch.tokens
    tokens = tuple(axis for axis in (chunks, TENSOR if layout.config.tensor > 1 else None) if axis is not None) or None
    table_spec = layout.parameter(("vocab", "width"), (model.vocab_size, model.width))
    hidden = jax.ShapeDtypeStruct(
        (*batch.tokens.shape, model.width), training.precision, sharding=layout.sharding(P(rows, tokens, None))
    )
    table = jax.ShapeDtypeStruct((model.vocab_size, model.width), jnp.float32, sharding=layout.sharding(table_spec))

    def residuals(hidden: jax.Array, table: jax.Array, batch: Batch) -> list[jax.Array]:
        loss = partial(weighted_loss, targets_BT=batch.targets, weights_BT=batch.loss_mask, chunk=training.loss_chunk)
        return jax.tree.leaves(jax.vjp(loss, hidden, table)[1])

    specs = (P(rows, tokens, None), table_spec, layout.batch)
    return saved_inside(jax.make_jaxpr(layout.run(residuals, specs, P()))(hidden, table, batch)).device


def _workspace(model: ModelConfig, training: TrainConfig, layout: Layout, batch: Batch, saved: SavedBytes) -> int:
    """The larger of one chunk's logits, and of what a layer's backward pass computes again."""
    assert model.vocab_size is not None
    here = prod(batch.tokens.sharding.shard_shape(batch.tokens.shape))
    logits = min(here, training.loss_chunk) * model.vocab_size // layout.config.tensor * LOGIT_BYTES
    if model.recompute == "none":
        return logits
    plain = _saved(dataclasses.replace(model, recompute="none", recompute_names=()), training, layout, batch)
    return max(logits, (plain.device - saved.device) // model.num_layers)


def _bytes_here(tree: Any) -> int:
    """Bytes that one device holds of a tree."""
    return sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
