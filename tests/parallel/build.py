"""One training step of small models, by one device and by a mesh of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr

from retro_jax.config import ChunkConfig, EncoderConfig, MeshConfig, ModelConfig, OptimizerConfig, RetroConfig, TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.parallel.layout import make_layout
from retro_jax.training.optimizer import is_trained, make_optimizer
from retro_jax.training.state import ModelForm, TrainState, abstract_state, initial_state, model_form, names
from retro_jax.training.step import make_train_step

V, B, L, C, K, R = 64, 8, 8, 4, 2, 8
T = L * C
Trained = Literal["all", "retrieval"]
Precision = Literal["float32", "bfloat16"]


def model_config(form: str, **model: Any) -> ModelConfig:
    """A "gpt" or a "retro" of 2 layers, with what is harder to divide: grouped queries, packed
    documents, a convolution that reaches over the end of a part, a learned gate and a null key."""
    chunks = ChunkConfig(chunk_len=C, num_neighbours=K, retrieved_len=R)
    retro = RetroConfig(
        chunks=chunks, encoder=EncoderConfig(num_layers=1), cca_layers=(1, 2), conv_width=3, null_key=0.5, gate="learned"
    )
    default: dict[str, Any] = {
        "vocab_size": V, "width": 32, "num_layers": 2, "num_heads": 8, "num_kv_heads": 2, "ffn_dim": 64, "max_positions": T,
        "tied_embedding": False, "retro": retro,
    }  # fmt: skip
    if form == "gpt":
        default |= {"retro": None, "positions": "learned", "tied_embedding": True, "activation": "swiglu"}
    return ModelConfig(**default | model)


def with_encoder(model: ModelConfig, **encoder: Any) -> ModelConfig:
    """The retro with another encoder."""
    assert model.retro is not None
    changed = dataclasses.replace(model.retro.encoder, **encoder)
    return dataclasses.replace(model, retro=dataclasses.replace(model.retro, encoder=changed))


def batch() -> Batch:
    """Rows of three documents, some with padding at their ends, and of very different shares of valid neighbours."""
    random = np.random.default_rng(0)
    segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row in range(B):
        cuts = [0, *sorted(random.choice(np.arange(1, L), 2, replace=False)), L]
        for number in range(3):
            start, end = cuts[number] * C, cuts[number + 1] * C - random.integers(0, C)
            segments[row, start:end], positions[row, start:end] = number + 1, np.arange(end - start)
    mask = np.broadcast_to(random.random((B, L, K, 1)) < np.linspace(0, 1, B)[:, None, None, None], (B, L, K, R)).copy()
    mask[..., R // 2 :] &= random.random((B, L, K, 1)) < 0.5
    return Batch(
        tokens=random.integers(0, V, (B, T), np.int32) * (segments > 0),
        targets=random.integers(0, V, (B, T), np.int32),
        segments=segments,
        positions=positions,
        loss_mask=((segments > 0) & (random.random((B, T)) < 0.9)).astype(np.float32),
        neighbours=random.integers(0, V, (B, L, K, R), np.int32) * mask,
        neighbour_mask=mask,
    )


class Step(NamedTuple):
    """What a step gives: the loss, and the gradient by name."""

    loss: float
    gradient: dict[str, np.ndarray]


def step(
    model: ModelConfig, mesh: MeshConfig | None = None, *, accumulate: int = 1, trained: Trained = "all", capacity: float = 1.0
) -> Step:
    """One step on the mesh, or on one device."""
    train = TrainConfig(accumulate=accumulate, precision="float32", loss_chunk=20, neighbour_capacity=capacity)
    form, optimizer = prepared(model, trained)
    state, rows, layout = first_state(model, trained), batch(), None
    if mesh is not None:
        layout = make_layout(mesh)
        assert layout is not None
        state = jax.tree.map(lambda a, place: jax.device_put(a, place.sharding), state, abstract_state(form, optimizer, layout))
        rows = layout.place(rows)
    run = jax.jit(make_train_step(form, optimizer, train, layout), compiler_options={"xla_backend_optimization_level": 0})
    after, metrics = run(state, rows)
    moments = after.moments[0].mu  # half the gradient
    gradient = {name: 2.0 * np.asarray(g) for name, g in zip(names(moments), jax.tree.leaves(moments), strict=True)}
    return Step(float(metrics.loss), gradient)


def program(
    model: ModelConfig,
    mesh: MeshConfig | None = None,
    *,
    accumulate: int = 1,
    precision: Precision = "float32",
) -> ClosedJaxpr:
    """The training step on the mesh, or on one device, as JAX traces it."""
    train = TrainConfig(accumulate=accumulate, precision=precision)
    form, optimizer = prepared(model)
    rows, layout = batch(), None
    if mesh is not None:
        layout = make_layout(mesh)
        assert layout is not None
        rows = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout.sharding(s)), rows, layout.batch)
    return jax.make_jaxpr(make_train_step(form, optimizer, train, layout))(abstract_state(form, optimizer, layout), rows)


def prepared(model: ModelConfig, trained: Trained = "all") -> tuple[ModelForm, optax.GradientTransformation]:
    """The model's form, and an optimizer whose first moment after a step is half the gradient."""
    form = model_form(model, is_trained(model, trained))
    return form, make_optimizer(OptimizerConfig(clip_norm=0.0, beta1=0.5), 10, form.trained)


def first_state(model: ModelConfig, trained: Trained = "all") -> TrainState:
    """The state before the first step, the same however it is computed and divided."""
    plain = dataclasses.replace(model, recompute="none", recompute_names=(), dropout=0.0, attention_dropout=0.0)
    return jax.device_get(_drawn(plain, trained))


@functools.cache
def _drawn(model: ModelConfig, trained: Trained) -> TrainState:
    return initial_state(*prepared(model, trained), seed=0)


@functools.cache
def alone(model: ModelConfig, accumulate: int = 1, trained: Trained = "all") -> Step:
    """The step on one device."""
    return step(model, accumulate=accumulate, trained=trained)


def assert_same(step: Step, expected: Step) -> None:
    """Loss and every gradient are equal within 1e-5 (relative, of an array's norm)."""
    np.testing.assert_allclose(step.loss, expected.loss, rtol=1e-6)  # measured 2e-7
    for name, gradient in expected.gradient.items():
        error = np.linalg.norm(step.gradient[name] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-5, f"{name}: {error:.1e}"  # measured at most 2e-6
