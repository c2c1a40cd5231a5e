"""What one training step costs on each device of a mesh, counted without any device: bytes held, operations, bytes received.

Operations, exchanges and what the forward pass saves are those of the program that would run. The memory is that of its worst
moment, estimated by the rules of XLA (:mod:`retro_jax.planning.peak`); :mod:`retro_jax.planning.compiled` asks XLA itself.
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
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from retro_jax.config import Config, ModelConfig, TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.kernels.choice import lowering_for_gpu
from retro_jax.model.division import encodes_own_chunks
from retro_jax.parallel.axes import AXES, TENSOR
from retro_jax.parallel.layout import Layout
from retro_jax.planning.peak import ACTIVATIONS, COPY, GRADIENTS, PARAMETERS, WORKSPACE, peak_memory
from retro_jax.planning.program import Collective, SavedBytes, collectives, product_flops, saved_inside
from retro_jax.planning.target import Target
from retro_jax.training.capacity import encoded_share, num_places
from retro_jax.training.flops import train_flops
from retro_jax.training.loss import weighted_loss
from retro_jax.training.optimizer import is_trained, make_optimizer
from retro_jax.training.state import ModelForm, TrainState, Tree, abstract_state, divided_params, model_form
from retro_jax.training.step import TrainStep, make_train_step

# XLA packs temporary arrays into one allocation that is larger than what they take together, by up to 36% in the programs of
# benchmarks/results/compiled_memory.json.
PACKING = 0.15


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step of a model on a mesh, for each device.

    ``memory``: bytes by kind at the worst moment. ``saved``: bytes that the forward pass of a part leaves for its backward pass,
    of the decoder, of the retrieval path and of the loss; ``offloaded``: those that lie in the host's memory. ``model_flops``: of
    the model's own matrix products, this device's share; ``hardware_flops``: of all products that it computes, also those
    computed again.
    ``exchanges``: what it receives. ``encodes_own_chunks``: the encoder is divided by chunks. ``parameters``: how many the model
    has. ``checkpoint``: bytes of a whole checkpoint.
    """

    config: Config
    model: ModelConfig
    memory: dict[str, int]
    saved: dict[str, int]
    offloaded: int
    model_flops: float
    hardware_flops: int
    exchanges: tuple[Collective, ...]
    encodes_own_chunks: bool
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
        parameters, mesh, parts = self.memory["parameters"], self.config.mesh, self.config.training.accumulate
        whole = parameters * (mesh.fsdp if mesh.fsdp_gather == "step" else 1)
        # The optimizer reads and writes parameters, gradients and moments once; each part reads the copy twice, writes and reads
        # what is saved, and adds to the sums of gradients.
        moved = 2 * (2 * parameters + self.memory["optimizer"])
        moved += parts * 2 * (whole // 2 + sum(self.saved.values()))
        moved += parts * 2 * whole if parts > 1 else 0
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
        model: with ``vocab_size``. Triton's kernels are counted as XLA's operations, which keep as much and hold more meanwhile.

    Raises:
        UserError: the mesh does not divide the model.
    """
    asked = model
    if model.implementation == "triton":
        model = dataclasses.replace(model, implementation="xla")
    layout = abstract_layout(config)
    training, form, _ = prepared(config, model)
    step, (state, batch) = traceable_step(config, model, layout)
    with lowering_for_gpu(90):
        program = jax.make_jaxpr(step)(state, batch)
    part = abstract_batch(config, model, layout, parts=training.accumulate)
    computing = layout.computing
    saved = _saved(model, training, computing, part)
    decoder = _saved(dataclasses.replace(model, retro=None), training, computing, part)
    (rows, length), neighbours = batch.tokens.shape, batch.neighbours.shape[2]
    return Plan(
        config=config,
        model=asked,
        memory=_memory(program, state, batch),
        saved={
            "decoder": decoder.device,
            "retrieval": saved.device - decoder.device,
            "loss": _saved_by_loss(model, training, computing, part),
        },
        offloaded=saved.host,
        model_flops=train_flops(model, rows=rows, seq_len=length, neighbours=neighbours, share=encoded_share(config))
        / config.mesh.devices,
        hardware_flops=product_flops(program),
        exchanges=tuple(collectives(program)),
        encodes_own_chunks=_encodes_own_chunks(model, training, computing, part),
        parameters=sum(prod(fact.shape) for fact in form.facts.values()),
        checkpoint=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
    )


def prepared(config: Config, model: ModelConfig) -> tuple[TrainConfig, ModelForm, optax.GradientTransformation]:
    """Training as an accelerator does it, the model's form and its optimizer."""
    dtype = "float32" if config.training.precision == "float32" else "bfloat16"
    training = dataclasses.replace(config.training, precision=dtype)  # type: ignore[arg-type]
    form = model_form(model, is_trained(model, training.trained))
    return training, form, make_optimizer(config.optimizer, training.steps, form.trained)


def traceable_step(config: Config, model: ModelConfig, layout: Layout) -> tuple[TrainStep, tuple[TrainState, Batch]]:
    """The training step, and the shapes, dtypes and places of its arguments."""
    training, form, optimizer = prepared(config, model)
    arguments = abstract_state(form, optimizer, layout), abstract_batch(config, model, layout)
    return make_train_step(form, optimizer, training, layout), arguments


def held_bytes(config: Config, model: ModelConfig) -> int:
    """What a device holds that no recomputation changes: parameters and moments.

    Raises:
        UserError: the mesh does not divide the model.
    """
    _, form, optimizer = prepared(config, model)
    state = abstract_state(form, optimizer, abstract_layout(config))
    return sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _memory(program: ClosedJaxpr, state: TrainState, batch: Batch) -> dict[str, int]:
    """Bytes by kind at the worst moment, with the room that XLA leaves between them."""

    def of(kind: str, tree: Any) -> list[str]:
        return [kind] * len(jax.tree.leaves(tree))

    parameters = (state.params, state.frozen)
    kinds = of("batch", state.step) + of(PARAMETERS, parameters) + of("optimizer", state.moments) + of("batch", batch)
    peak = peak_memory(program, kinds)
    order = (PARAMETERS, "optimizer", "batch", COPY, GRADIENTS, ACTIVATIONS, WORKSPACE)
    return {kind: peak[kind] for kind in order} | {"packing": round(PACKING * sum(peak[kind] for kind in order[3:]))}


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
    form, params = _computed_with(model, training, layout)

    def residuals(params: Tree, batch: Batch) -> list[jax.Array]:
        key, places = jax.random.key(0), num_places(training, *batch.neighbours.shape[:2])
        forward = jax.vjp(lambda params: form.merge(params, {})(batch, dropout_key=key, places=places), params)
        return jax.tree.leaves(forward[1])

    return saved_inside(jax.make_jaxpr(layout.run(residuals, (form.specs(layout)[0], layout.batch), P()))(params, batch))


def _computed_with(model: ModelConfig, training: TrainConfig, layout: Layout) -> tuple[ModelForm, Tree]:
    """The model's form, and its parameters in the dtype of the computation."""
    form = model_form(model, is_trained(model))
    dtype = jnp.dtype(training.precision)
    params = divided_params(form, layout)[0]
    return form, jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype, sharding=p.sharding), params)


def _encodes_own_chunks(model: ModelConfig, training: TrainConfig, layout: Layout, batch: Batch) -> bool:
    """How the devices along ``tensor`` share the encoder."""
    mesh, (rows, chunks) = layout.config, batch.neighbours.shape[:2]
    packs = num_places(training, rows // (mesh.data * mesh.fsdp), chunks // mesh.sequence) is not None
    if mesh.tensor == 1 or batch.neighbours.size == 0 or packs:
        return False
    form, params = _computed_with(model, training, layout)
    said = []

    def ask(params: Tree, batch: Batch) -> jax.Array:
        encoder = form.merge(params, {}).encoder
        assert encoder is not None
        B, T = batch.tokens.shape
        states_BTD = jnp.zeros((B, T // layout.config.tensor, model.width))
        said.append(encodes_own_chunks(encoder, batch, states_BTD))
        return jnp.zeros(())

    jax.make_jaxpr(layout.run(ask, (form.specs(layout)[0], layout.batch), P()))(params, batch)
    return said[0]


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
