"""One layer of a model traced by itself, divided over devices that need not be there."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from retro_jax.config import MeshConfig, ModelConfig
from retro_jax.kernels.attention import CausalMask, KeyMask
from retro_jax.model.cca import Neighbours
from retro_jax.model.decoder import DecoderLayer, Row
from retro_jax.model.encoder import EncoderLayer, encoder_shape
from retro_jax.model.layers import Noise
from retro_jax.parallel.axes import AXES
from retro_jax.parallel.layout import Layout
from retro_jax.parallel.recompute import recomputed
from retro_jax.planning.activations import LayerKind, Place
from retro_jax.planning.program import SavedBytes, inner_jaxprs


def layout(**sizes: int) -> Layout:
    mesh = MeshConfig(**sizes)
    shape = tuple(getattr(mesh, axis) for axis in AXES)
    return Layout(mesh, AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES)))


@functools.cache
def backward_of(model: ModelConfig, kind: LayerKind, place: Place) -> ClosedJaxpr:
    """(this device's stream, parameters, what else it reads) -> all that the layer's backward pass is given: a ``shard_map``."""
    there = layout(tensor=place.tensor, sequence=place.sequence, fsdp=place.fsdp)
    encoder = kind in ("conditioned encoder", "encoder")
    retro = model.retro

    def make() -> nnx.Module:
        if not encoder:
            return DecoderLayer(model, cca=kind == "cca", key=jax.random.key(0))
        assert retro is not None
        return EncoderLayer(model, retro.encoder, conditioned=kind != "encoder", key=jax.random.key(0))

    graph, state = nnx.split(nnx.eval_shape(make))
    dtype = {2: jnp.bfloat16, 4: jnp.float32}[place.number_bytes]
    specs = jax.tree.map(lambda p: there.parameter(p.dims, p.shape), state, is_leaf=lambda p: isinstance(p, nnx.Variable))
    leaves, tree = jax.tree.flatten(state)
    places = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P))
    params = [jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=there.sharding(p)) for leaf, p in zip(leaves, places, strict=True)]

    B, T, t = place.rows, place.tokens, place.tensor
    L, K, R = place.chunks, place.neighbours, place.retrieved_len
    width = model.width if not encoder else encoder_shape(model).width
    encoded = model.width if model.retro is None else encoder_shape(model).width
    C = 1 if retro is None else retro.chunks.chunk_len
    X = B * L * K
    more = L + (place.sequence > 1)
    S = jax.ShapeDtypeStruct
    stream = S((X, R // t, width) if encoder else (B, T // t, width), dtype)
    given: dict[str, Any] = {"key": jax.eval_shape(lambda: jax.random.key(0))}
    if encoder:
        masks = {"mask": KeyMask(S((X, R), bool)), "chunk_mask": KeyMask(S((B * L, C), bool))}
        given |= {**masks, "positions": S((1, R), jnp.int32)}
        given |= {"context": S((B * L, C, model.width), dtype), "numbers": S((X, R), jnp.uint32)}
    else:
        first = S((), jnp.int32) if place.sequence > 1 else None
        mask = CausalMask(S((B, T), jnp.int32), S((B, T * place.sequence), jnp.int32), first)
        given |= {"mask": mask, "positions": S((B, T), jnp.int32), "rows": S((B,), jnp.uint32)}
        given |= {"context": S((B, more, K, R, encoded), dtype), "neighbour_mask": S((B, more, K, R), bool)}
        given |= {"reads": S((B, T), bool), "segments": S((B, T), jnp.int32), "numbers": S((B, T), jnp.uint32)}

    given["own_numbers"] = S(stream.shape[:2], jnp.uint32)

    def backward(stream: jax.Array, params: list[jax.Array], given: dict[str, Any]) -> list[jax.Array]:
        noise = Noise(given["key"], given["own_numbers"], given["numbers"]) if place.dropout else None

        def run(params: list[jax.Array], stream: jax.Array, context: jax.Array) -> jax.Array:
            layer: Any = nnx.merge(graph, jax.tree.unflatten(tree, params))
            if encoder:
                arguments: tuple[Any, ...] = (given["mask"], given["positions"], context, given["chunk_mask"])
            else:
                row = Row(given["mask"], given["positions"], given["rows"])
                neighbours = Neighbours(context, given["neighbour_mask"], given["reads"], given["segments"], None)
                arguments = (row, neighbours if kind == "cca" else None)
            return recomputed(layer, layer.recompute)(stream, *arguments, noise)

        return jax.tree.leaves(jax.vjp(run, params, stream, given["context"])[1])

    mapped = there.run(backward, (P(), list(places), P()), P())
    return jax.make_jaxpr(mapped)(stream, params, given)


def traced_bytes(model: ModelConfig, kind: LayerKind, place: Place) -> SavedBytes:
    """What the layer keeps, its input from the stream counted and other arguments not."""
    inside = _inside(backward_of(model, kind, place))
    given = {*inside.invars[1:], *inside.constvars}
    sizes = {"device": 0, "host": 0}
    for array in {v for v in inside.outvars if isinstance(v, Var)} - given:
        place_of = "host" if "host" in str(array.aval.memory_space).lower() else "device"
        sizes[place_of] += array.aval.size * array.aval.dtype.itemsize
    return SavedBytes(**sizes)


def named(model: ModelConfig, kind: LayerKind, place: Place) -> Counter[str]:
    """How often each name stands in the layer's forward pass."""

    def names(jaxpr: Jaxpr) -> Iterator[str]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "name":
                yield equation.params["name"]
            for inner in inner_jaxprs(equation.params):
                yield from names(inner)

    return Counter(names(_inside(backward_of(model, kind, place))))


def _inside(program: ClosedJaxpr) -> Jaxpr:
    (mapped,) = (equation for equation in program.jaxpr.eqns if equation.primitive.name == "shard_map")
    return mapped.params["jaxpr"]
