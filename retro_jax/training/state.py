"""What training carries from step to step, and the names of its arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from retro_jax.config import ModelConfig
from retro_jax.model import Retro
from retro_jax.parallel.layout import Layout

Path = tuple[str | int, ...]
Tree = dict[str | int, Any]


class TrainState(NamedTuple):
    """A pytree: ``step`` int32, finished steps; ``params`` the trained parameters and ``frozen`` the others, nested dicts of
    float32; ``moments`` the optimizer's state, of ``params`` alone."""

    step: jax.Array
    params: Tree
    frozen: Tree
    moments: Any


class ParameterFacts(NamedTuple):
    """Shape with the leading dim of a scanned stack, and the logical dims of one layer without it."""

    shape: tuple[int, ...]
    dims: tuple[str, ...]


@dataclass(frozen=True)
class ModelForm:
    """A model without its numbers: the NNX graph, the facts of every parameter, and which of them are trained."""

    config: ModelConfig
    graph: nnx.GraphDef
    facts: dict[Path, ParameterFacts]
    is_trained: Callable[[Path], bool]

    @property
    def trained(self) -> dict[Path, ParameterFacts]:
        """The facts of the trained parameters."""
        return {path: fact for path, fact in self.facts.items() if self.is_trained(path)}

    def split(self, model: Retro) -> tuple[Tree, Tree]:
        """The model's (params, frozen)."""
        _, *states = nnx.split(model, lambda path, _: self.is_trained(path), ...)
        params, frozen = (cast(Tree, nnx.to_pure_dict(state)) for state in states)
        return params, frozen

    def specs(self, layout: Layout) -> tuple[Tree, Tree]:
        """How the parameters are divided over the devices: trees as of :meth:`split`."""
        return _nested(self.trained, layout), _nested({p: f for p, f in self.facts.items() if not self.is_trained(p)}, layout)

    def merge(self, params: Tree, frozen: Tree) -> Retro:
        """The model with these parameters."""
        return nnx.merge(self.graph, params, frozen)


def model_form(config: ModelConfig, is_trained: Callable[[Path], bool]) -> ModelForm:
    """The form of the model of ``config``, found without allocating it."""
    model = nnx.eval_shape(lambda: Retro(config, key=jax.random.key(0)))
    graph, state = nnx.split(model)
    facts: dict[Path, ParameterFacts] = {
        cast(Path, path): ParameterFacts(variable.shape, variable.dims) for path, variable in nnx.to_flat_state(state)
    }
    return ModelForm(config, graph, facts, is_trained)


def initial_state(
    form: ModelForm, optimizer: optax.GradientTransformation, seed: int, layout: Layout | None = None
) -> TrainState:
    """The state before the first step: parameters drawn with ``seed``, moments 0. Each device draws what it holds of them."""
    # On CPU most of the start is LLVM's work on random number generators that run once: a third of it at its lowest level.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    places = None
    if layout is not None:
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(form, optimizer, layout))
    return jax.jit(partial(_draw, form, optimizer), compiler_options=options, out_shardings=places)(jax.random.key(seed))


def abstract_state(form: ModelForm, optimizer: optax.GradientTransformation, layout: Layout | None = None) -> TrainState:
    """Shapes, dtypes and shardings of the state: on a mesh each moment is divided as its parameter, else one device has all."""
    state = jax.eval_shape(partial(_draw, form, optimizer), jax.random.key(0))
    if layout is None:
        return on_one_device(state)

    params, frozen = divided_params(form, layout)
    moments = optax.tree.map_params(
        optimizer, lambda moment, param: _placed(moment, param.sharding.spec, layout), state.moments, params,
        transform_non_params=lambda leaf: _placed(leaf, P(), layout),
    )  # fmt: skip
    return TrainState(_placed(state.step, P(), layout), params, frozen, moments)  # type: ignore[arg-type]


def divided_params(form: ModelForm, layout: Layout) -> tuple[Tree, Tree]:
    """Shapes, dtypes and shardings of the model's (params, frozen) on a mesh."""
    drawn = jax.eval_shape(lambda: form.split(Retro(form.config, key=jax.random.key(0))))
    params, frozen = (
        jax.tree.map(lambda leaf, spec: _placed(leaf, spec, layout), *pair)
        for pair in zip(drawn, form.specs(layout), strict=True)
    )
    return params, frozen


def _placed(leaf: jax.ShapeDtypeStruct, spec: P, layout: Layout) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(spec))


def on_one_device(abstract: Any) -> Any:
    """Shapes and dtypes with this process's first device as the place."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract)


def _nested(facts: dict[Path, ParameterFacts], layout: Layout) -> Tree:
    """Nested dicts of each parameter's division."""
    tree: Tree = {}
    for path, fact in facts.items():
        place = tree
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = layout.parameter(fact.dims, fact.shape)
    return tree


def _draw(form: ModelForm, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params, frozen = form.split(Retro(form.config, key=key))
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params))


def names(tree: Any) -> list[str]:
    """The name of each leaf, in the order of ``jax.tree.leaves``: its keys with dots between."""
    return [".".join(_key(key) for key in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown tree key {key!r}")


@jax.jit
def digests(leaves: list[jax.Array]) -> list[jax.Array]:
    """A uint32 of each array that changes when any one of its numbers does: its bits, each times an odd number of its place."""
    return [_digest(leaf, jnp.uint32(0)) for leaf in leaves]


@jax.jit
def row_digest(row: jax.Array, number: jax.Array) -> jax.Array:
    """What one row of the leading dim adds to an array's digest: these sums make it up, modulo 2**32.

    Args:
        number: which row it is, uint32.
    """
    return _digest(row, number)


def _digest(array: jax.Array, first_place: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = jnp.full(array.shape, first_place)
    for dim in range(array.ndim):
        place = place * jnp.uint32(2_654_435_761) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim)
    return jnp.sum(bits * (place * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)
