"""Self-attention, cross-attention and the feed-forward block, as holders of parameters around the attention kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retro_jax.config import Activation, Implementation, ModelConfig, Positions, Recompute
from retro_jax.kernels.attention import CausalMask, Mask, attention
from retro_jax.model.layers import (
    Linear,
    Noise,
    activate,
    dropout,
    gathered,
    normal,
    parts,
    project_in,
    project_out,
    residual_std,
    rotate,
    two_products,
)
from retro_jax.parallel.axes import SEQUENCE, TENSOR, axis_index, axis_size
from retro_jax.parallel.collectives import gather_row, gathered_again


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The sizes and switches that a layer of the decoder or of the encoder is built from."""

    width: int
    num_heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    activation: Activation
    bias: bool
    qkv_bias: bool
    positions: Positions
    rotary_fraction: float
    rotary_base: float
    rotary_scale: float
    dropout: float
    attention_dropout: float
    init_std: float
    out_std: float
    implementation: Implementation | None
    recompute: Recompute

    @classmethod
    def of_decoder(cls, config: ModelConfig) -> BlockShape:
        """The shape of the decoder's layers."""
        return cls(
            width=config.width,
            num_heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_dim=config.heads_dim,
            ffn_dim=config.ffn_width,
            activation=config.activation,
            bias=config.linear_bias,
            qkv_bias=config.linear_bias if config.qkv_bias is None else config.qkv_bias,
            positions=config.positions,
            rotary_fraction=config.rotary_fraction,
            rotary_base=config.rotary_base,
            rotary_scale=config.rotary_scale,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            init_std=config.init_std,
            out_std=residual_std(config.init_std, config.num_layers),
            implementation=config.implementation,
            recompute=Recompute.of(config.recompute, config.recompute_names),
        )


class AttentionProjections(nnx.Module):
    """Query, key/value and output projections; ``kv_width`` is the width of what is attended to.

    ``alone``: each device along ``tensor`` computes all heads, for rows of its own.
    """

    def __init__(self, shape: BlockShape, kv_width: int, *, key: jax.Array) -> None:
        N, G, H, D = shape.num_heads, shape.kv_heads, shape.head_dim, shape.width
        self.alone = False
        keys = jax.random.split(key, 3)
        init = normal(shape.init_std)
        bias, kv_dims = shape.qkv_bias, "kv_width two kv_heads head_dim"
        self.query = Linear("width heads head_dim", (D,), (N, H), bias=bias, init=init, key=keys[0])
        self.key_value = Linear(kv_dims, (kv_width,), (2, G, H), bias=bias, init=init, key=keys[1])
        self.out = Linear("heads head_dim width", (N, H), (D,), bias=shape.bias, init=normal(shape.out_std), key=keys[2])

    def project_keys_and_values(self, x: jax.Array, keys_of: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Keys and values [..., G, H] of x [..., D], for the key/value heads that this device's query heads read; keys of
        ``keys_of`` where it is given.

        A product for each, though their weights are one array: a kernel then reads what the products wrote, where slices of one
        product would be copied for it, and their gradients joined. (On a CPU one product takes as long.)
        """
        weight_D2GH, bias_2GH = self._key_value_arrays()
        k, v = two_products(x if keys_of is None else keys_of, x, weight_D2GH)
        if bias_2GH is None:
            return k, v
        return k + bias_2GH[(0, *(None,) * (k.ndim - 2))], v + bias_2GH[(1, *(None,) * (v.ndim - 2))]

    def _key_value_arrays(self) -> tuple[jax.Array, jax.Array | None]:
        """Weight and bias of those heads. Where there are fewer key/value heads than devices along ``tensor``, each device has
        them all, and takes the one that its query heads read."""
        weight = gathered(self.key_value.weight, alone=self.alone)
        bias = None if self.key_value.bias is None else gathered(self.key_value.bias, alone=self.alone)
        devices, heads = axis_size(TENSOR), self.key_value.weight.whole[2]
        if devices > 1 and weight.shape[2] == heads and not self.alone:
            taken = axis_index(TENSOR) * heads // devices
            weight = jax.lax.dynamic_slice_in_dim(weight, taken, 1, 2)
            bias = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, taken, 1, 1)
        return weight, bias


class SelfAttention(AttentionProjections):
    """Self-attention within X rows; the mask says who sees whom."""

    def __init__(self, shape: BlockShape, *, key: jax.Array) -> None:
        super().__init__(shape, shape.width, key=key)
        self.shape = shape

    def __call__(
        self,
        x_XTD: jax.Array,
        mask: Mask | None,
        positions_XT: jax.Array,
        noise: Noise | None,
        *,
        in_parts: bool = False,
    ) -> jax.Array:
        """What attention adds to the stream.

        Args:
            x_XTD: the normed stream, this device's share of the tokens.
            mask: which of these rows' tokens see which.
            positions_XT: of all tokens that the devices along ``tensor`` hold together.
            noise: for dropout.
            in_parts: the devices along ``sequence`` hold parts of the rows: keys and values of whole rows are gathered, and S
                counts the whole row's tokens.
        """
        q_XTNH, k_XTGH, v_XTGH = self.project(x_XTD, positions_XT)
        if in_parts:
            k_XTGH, v_XTGH = gather_row(k_XTGH), gather_row(v_XTGH)
        return self.read(q_XTNH, k_XTGH, v_XTGH, mask, noise)

    def project(self, x_XTD: jax.Array, positions_XT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [X, T, N, H], keys and values [X, T, G, H] of tokens at these positions (X may be 1: the same in all rows)."""
        shape = self.shape
        part = shape.recompute.part("attention", alone=self.alone)
        q_XTNH, (k_XTGH, v_XTGH) = project_in(x_XTD, self.query, self.project_keys_and_values, part=part)
        if shape.positions == "rotary":
            rotary = {"fraction": shape.rotary_fraction, "base": shape.rotary_base, "scale": shape.rotary_scale}
            q_XTNH, k_XTGH = rotate(q_XTNH, positions_XT, **rotary), rotate(k_XTGH, positions_XT, **rotary)
        return name_operands("attention", q_XTNH, k_XTGH, v_XTGH)

    def read(
        self, q_XQNH: jax.Array, k_XSGH: jax.Array, v_XSGH: jax.Array, mask: Mask | None, noise: Noise | None = None
    ) -> jax.Array:
        """What queries add to the stream, from keys and values of the same tokens or of others (a cache)."""
        shape = self.shape
        weights_noise, out_noise = parts(noise, 2)
        o_XQNH = attend(q_XQNH, k_XSGH, v_XSGH, mask, shape, weights_noise)
        return dropout(
            project_out(o_XQNH, self.out, shape.recompute.part("attention", alone=self.alone)), shape.dropout, out_noise
        )


class CrossAttention(AttentionProjections):
    """Attention of the encoder's neighbour tokens to the decoder's states of the chunk that asks; no positions."""

    def __init__(self, shape: BlockShape, kv_width: int, *, attention_dropout: float, key: jax.Array) -> None:
        super().__init__(shape, kv_width, key=key)
        self.shape, self.attention_dropout = shape, attention_dropout

    def __call__(self, x_XQD: jax.Array, context_XSD: jax.Array, mask: Mask | None, noise: Noise | None) -> jax.Array:
        """What the tokens x read; ``context_XSD`` is whole, x this device's share of the tokens."""
        shape = dataclasses.replace(self.shape, attention_dropout=self.attention_dropout)
        part = shape.recompute.part("cross", alone=self.alone)
        (q_XQNH,) = project_in(x_XQD, self.query, part=part)
        k_XSGH, v_XSGH = gathered_again(self.project_keys_and_values, part.gathers_again)(context_XSD)
        q_XQNH, k_XSGH, v_XSGH = name_operands("cross", q_XQNH, k_XSGH, v_XSGH)
        weights_noise, out_noise = parts(noise, 2)
        o = attend(q_XQNH, k_XSGH, v_XSGH, mask, shape, weights_noise, name="cross")
        return dropout(project_out(o, self.out, part), shape.dropout, out_noise)


class FeedForward(nnx.Module):
    """up - activation - down; "swiglu" has a gate beside up, stacked as [gate, up].

    ``alone``: each device along ``tensor`` computes all columns, for tokens of its own.
    """

    def __init__(self, shape: BlockShape, *, key: jax.Array) -> None:
        D, F = shape.width, shape.ffn_dim
        up_key, down_key = jax.random.split(key)
        gated = shape.activation == "swiglu"
        dims, out = ("width two ffn", (2, F)) if gated else ("width ffn", (F,))
        self.up = Linear(dims, (D,), out, bias=shape.bias, init=normal(shape.init_std), key=up_key)
        self.down = Linear("ffn width", (F,), (D,), bias=shape.bias, init=normal(shape.out_std), key=down_key)
        self.shape, self.alone = shape, False

    def __call__(self, x_XTD: jax.Array, noise: Noise | None) -> jax.Array:
        shape = self.shape
        part = shape.recompute.part("ffn", alone=self.alone)
        (up,) = project_in(x_XTD, self.up, part=part)
        active = activate(checkpoint_name(up, "ffn_up"), shape.activation)
        return dropout(project_out(active, self.down, part), shape.dropout, noise)


def name_operands(part: str, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of a sub-layer under the names that a recomputation policy knows."""
    return checkpoint_name(q, f"{part}_query"), checkpoint_name(k, f"{part}_key"), checkpoint_name(v, f"{part}_value")


def attend(
    q_XQNH: jax.Array,
    k_XSGH: jax.Array,
    v_XSGH: jax.Array,
    mask: Mask | None,
    shape: BlockShape,
    noise: Noise | None,
    name: str = "attention",
) -> jax.Array:
    """Attention as the shape says, with dropout where there is noise."""
    return attention(
        q_XQNH,
        k_XSGH,
        v_XSGH,
        mask,
        dropout=0.0 if noise is None else shape.attention_dropout,
        dropout_key=None if noise is None else noise.key,
        query_numbers_XQN=None if noise is None else noise.queries(q_XQNH.shape[2], shape.num_heads),
        name=name,
        implementation=shape.implementation,
    )


def causal_mask(segments_BT: jax.Array) -> CausalMask:
    """A token sees itself and what came before it in its document; padding, of segment 0, sees and shows nothing.

    Keys are the tokens of the whole row, of which the devices along ``sequence`` have T each.
    """
    parts, T = axis_size(SEQUENCE), segments_BT.shape[1]
    return CausalMask(segments_BT, gather_row(segments_BT), axis_index(SEQUENCE) * jnp.int32(T) if parts > 1 else None)
