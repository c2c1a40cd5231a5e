"""Self-attention, cross-attention and the feed-forward block, as holders of parameters around the attention kernels."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import Activation, Implementation, ModelConfig, Positions
from retro_jax.kernels.attention import attention
from retro_jax.model.layers import Linear, activate, dropout, normal, residual_std, rotate, split_key


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
        )


class AttentionProjections(nnx.Module):
    """Query, key/value and output projections; ``kv_width`` is the width of what is attended to."""

    def __init__(self, shape: BlockShape, kv_width: int, *, key: jax.Array) -> None:
        N, G, H, D = shape.num_heads, shape.kv_heads, shape.head_dim, shape.width
        keys = jax.random.split(key, 3)
        init = normal(shape.init_std)
        bias, kv_dims = shape.qkv_bias, "kv_width two kv_heads head_dim"
        self.query = Linear("width heads head_dim", (D,), (N, H), bias=bias, init=init, key=keys[0])
        self.key_value = Linear(kv_dims, (kv_width,), (2, G, H), bias=bias, init=init, key=keys[1])
        self.out = Linear("heads head_dim width", (N, H), (D,), bias=shape.bias, init=normal(shape.out_std), key=keys[2])


class SelfAttention(AttentionProjections):
    """Self-attention within X rows; the mask says who sees whom."""

    def __init__(self, shape: BlockShape, *, key: jax.Array) -> None:
        super().__init__(shape, shape.width, key=key)
        self.shape = shape

    def __call__(self, x_XTD: jax.Array, mask_XQS: jax.Array | None, positions_XT: jax.Array, key: jax.Array | None) -> jax.Array:
        shape = self.shape
        q_XTNH = self.query(x_XTD)
        kv_XT2GH = self.key_value(x_XTD)
        k_XTGH, v_XTGH = kv_XT2GH[:, :, 0], kv_XT2GH[:, :, 1]
        if shape.positions == "rotary":
            rotary = {"fraction": shape.rotary_fraction, "base": shape.rotary_base, "scale": shape.rotary_scale}
            q_XTNH, k_XTGH = rotate(q_XTNH, positions_XT, **rotary), rotate(k_XTGH, positions_XT, **rotary)
        weights_key, out_key = split_key(key, 2)
        o_XTNH = attention(
            q_XTNH,
            k_XTGH,
            v_XTGH,
            mask_XQS,
            dropout=shape.attention_dropout if key is not None else 0.0,
            dropout_key=weights_key,
            implementation=shape.implementation,
        )
        return dropout(self.out(o_XTNH), shape.dropout, out_key)


class CrossAttention(AttentionProjections):
    """Attention of the encoder's neighbour tokens to the decoder's states of the chunk that asks; no positions."""

    def __init__(self, shape: BlockShape, kv_width: int, *, attention_dropout: float, key: jax.Array) -> None:
        super().__init__(shape, kv_width, key=key)
        self.shape, self.attention_dropout = shape, attention_dropout

    def __call__(self, x_XQD: jax.Array, context_XSD: jax.Array, mask_XQS: jax.Array | None, key: jax.Array | None) -> jax.Array:
        kv = self.key_value(context_XSD)
        weights_key, out_key = split_key(key, 2)
        o = attention(
            self.query(x_XQD),
            kv[:, :, 0],
            kv[:, :, 1],
            mask_XQS,
            dropout=self.attention_dropout if key is not None else 0.0,
            dropout_key=weights_key,
            implementation=self.shape.implementation,
        )
        return dropout(self.out(o), self.shape.dropout, out_key)


class FeedForward(nnx.Module):
    """up - activation - down; "swiglu" has a gate beside up, stacked as [gate, up]."""

    def __init__(self, shape: BlockShape, *, key: jax.Array) -> None:
        D, F = shape.width, shape.ffn_dim
        up_key, down_key = jax.random.split(key)
        gated = shape.activation == "swiglu"
        dims, out = ("width two ffn", (2, F)) if gated else ("width ffn", (F,))
        self.up = Linear(dims, (D,), out, bias=shape.bias, init=normal(shape.init_std), key=up_key)
        self.down = Linear("ffn width", (F,), (D,), bias=shape.bias, init=normal(shape.out_std), key=down_key)
        self.shape = shape

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return dropout(self.down(activate(self.up(x), self.shape.activation)), self.shape.dropout, key)


def causal_mask(segments_BT: jax.Array) -> jax.Array:
    """bool [B, T, T]: a token sees itself and what came before it in its document; padding sees and shows nothing."""
    T = segments_BT.shape[1]
    causal = jnp.arange(T, dtype=jnp.int32)[:, None] >= jnp.arange(T, dtype=jnp.int32)[None, :]
    same = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT > 0)[:, :, None]
    return causal[None] & same
