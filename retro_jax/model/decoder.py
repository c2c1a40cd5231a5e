"""Decoder layers, and their stack: depth is scanned by repeating groups, so that compile time does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retro_jax.config import ModelConfig
from retro_jax.kernels.attention import CausalMask
from retro_jax.model.attention import BlockShape, FeedForward, SelfAttention
from retro_jax.model.cca import ChunkedCrossAttention, Neighbours
from retro_jax.model.encoder import encoder_shape
from retro_jax.model.layers import Noise, NormLayer, parts
from retro_jax.parallel.recompute import recomputed


class Row(NamedTuple):
    """What every decoder layer reads beside the residual stream: who sees whom, positions, and the rows' places in the batch."""

    mask: CausalMask
    positions_BT: jax.Array
    numbers_B: jax.Array


class DecoderLayer(nnx.Module):
    """Self-attention, with ``cca`` chunked cross-attention, feed-forward; pre-norm throughout."""

    def __init__(self, config: ModelConfig, *, cca: bool, key: jax.Array) -> None:
        shape = BlockShape.of_decoder(config)
        keys = jax.random.split(key, 6)
        self.recompute = shape.recompute
        self.norm_attention = NormLayer(config.norm, config.width, config.norm_eps, key=keys[0])
        self.attention = SelfAttention(shape, key=keys[1])
        self.norm_cca = NormLayer(config.norm, config.width, config.norm_eps, key=keys[2]) if cca else None
        self.cca = ChunkedCrossAttention(config, encoder_shape(config).width, key=keys[3]) if cca else None
        self.norm_ffn = NormLayer(config.norm, config.width, config.norm_eps, key=keys[4])
        self.ffn = FeedForward(shape, key=keys[5])

    def attend(self, x_BTD: jax.Array, row: Row, noise: Noise | None) -> jax.Array:
        """The residual stream after self-attention."""
        read = self.attention(self.norm_attention(x_BTD), row.mask, row.positions_BT, noise, in_parts=True)
        return checkpoint_name(x_BTD + read, "after_attention")

    def finish(self, x_BTD: jax.Array, neighbours: Neighbours | None, noises: list[Noise | None]) -> jax.Array:
        """The residual stream after CCA, where the layer has it and there are neighbours, and feed-forward."""
        if self.cca is not None and self.norm_cca is not None and neighbours is not None:
            x_BTD = checkpoint_name(x_BTD + self.cca(self.norm_cca(x_BTD), neighbours, noises[0]), "after_cca")
        return x_BTD + self.ffn(self.norm_ffn(x_BTD), noises[1])

    def __call__(self, x_BTD: jax.Array, row: Row, neighbours: Neighbours | None, noise: Noise | None) -> jax.Array:
        noises = parts(noise, 3)
        return self.finish(self.attend(x_BTD, row, noises[0]), neighbours, noises[1:])


class Group(nnx.Module):
    """Consecutive layers that repeat together: ``pattern`` says which of them have CCA."""

    def __init__(self, config: ModelConfig, pattern: tuple[bool, ...], *, key: jax.Array) -> None:
        keys = jax.random.split(key, len(pattern))
        self.layers = nnx.List(DecoderLayer(config, cca=cca, key=k) for cca, k in zip(pattern, keys, strict=True))

    def __call__(self, x_BTD: jax.Array, row: Row, neighbours: Neighbours | None, noise: Noise | None) -> jax.Array:
        for layer, own in zip(self.layers, parts(noise, len(self.layers)), strict=True):
            x_BTD = recomputed(layer, layer.recompute)(x_BTD, row, neighbours, own)
        return x_BTD


class Stack(nnx.Module):
    """``count`` groups of one pattern; every parameter carries a leading dim of that size."""

    def __init__(self, config: ModelConfig, pattern: tuple[bool, ...], count: int, *, key: jax.Array) -> None:
        keys = jax.random.split(key, count)
        graph = nnx.split(nnx.eval_shape(lambda: Group(config, pattern, key=key)))[0]
        self.group = nnx.merge(graph, jax.vmap(lambda k: nnx.split(Group(config, pattern, key=k))[1])(keys))
        self.count = count

    def __call__(self, x_BTD: jax.Array, row: Row, neighbours: Neighbours | None, noise: Noise | None) -> jax.Array:
        graph, state = nnx.split(self.group)

        def body(x: jax.Array, group: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, None]:
            own = None if noise is None else noise.part(group[1])
            return nnx.merge(graph, group[0])(x, row, neighbours, own), None

        return jax.lax.scan(body, x_BTD, (state, jnp.arange(self.count)))[0]

    def layers(self) -> Iterator[DecoderLayer]:
        """Every layer of every group in order, with parameters of its own."""
        graph, state = nnx.split(self.group)
        for number in range(self.count):
            yield from nnx.merge(graph, jax.tree.map(lambda a, at=number: a[at], state)).layers


def runs(num_layers: int, cca_layers: tuple[int, ...]) -> list[tuple[tuple[bool, ...], int]]:
    """Cut the layers into (pattern, count) runs: those before the first CCA layer, that layer alone (it also runs the encoder),
    then the shortest pattern that repeats, and what is left over.

    >>> runs(12, (6, 9, 12))
    [((False,), 5), ((True,), 1), ((False, False, True), 2)]
    """
    kinds = tuple(i in cca_layers for i in range(1, num_layers + 1))
    first = kinds.index(True) if any(kinds) else num_layers
    cut: list[tuple[tuple[bool, ...], int]] = [((False,), first)] if first else []
    if first == num_layers:
        return cut
    cut.append(((True,), 1))
    rest = kinds[first + 1 :]
    if not rest:
        return cut

    def bodies(period: int) -> int:
        count = 1
        while rest[count * period : (count + 1) * period] == rest[:period]:
            count += 1
        return count

    period = min(range(1, len(rest) + 1), key=lambda p: (p + len(rest) - p * bodies(p), p))
    count = bodies(period)
    cut.append((rest[:period], count))
    if left := rest[period * count :]:
        cut.append((left, 1))
    return cut
