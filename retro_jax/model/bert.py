"""A bidirectional encoder of BERT's form, and one vector of unit length for each text (Devlin et al. 2019; Reimers and Gurevych
2019, "Sentence-BERT")."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import Activation, Recompute
from retro_jax.kernels.attention import KeyMask, Mask
from retro_jax.kernels.precision import accumulation_dtype
from retro_jax.model.attention import BlockShape, FeedForward, SelfAttention
from retro_jax.model.layers import Embedding, Linear, NormLayer, normal


@dataclass(frozen=True, kw_only=True)
class BertShape:
    """Sizes and switches of an encoder; ``pooler`` says whether it has the projection of the first token."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    max_positions: int
    token_types: int
    activation: Activation
    norm_eps: float
    pooler: bool
    init_std: float = 0.02

    @property
    def block(self) -> BlockShape:
        """The shape of its layers."""
        return BlockShape(
            width=self.width,
            num_heads=self.num_heads,
            kv_heads=self.num_heads,
            head_dim=self.width // self.num_heads,
            ffn_dim=self.ffn_dim,
            activation=self.activation,
            bias=True,
            qkv_bias=True,
            positions="learned",
            rotary_fraction=1.0,
            rotary_base=10_000.0,
            rotary_scale=1.0,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=self.init_std,
            out_std=self.init_std,
            implementation=None,
            recompute=Recompute(),
        )


class BertLayer(nnx.Module):
    """Self-attention and feed-forward, each with its norm after the residual sum."""

    def __init__(self, shape: BertShape, *, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        self.attention = SelfAttention(shape.block, key=keys[0])
        self.norm_attention = NormLayer("layernorm", shape.width, shape.norm_eps, key=keys[1])
        self.ffn = FeedForward(shape.block, key=keys[2])
        self.norm_ffn = NormLayer("layernorm", shape.width, shape.norm_eps, key=keys[3])

    def __call__(self, x_BTD: jax.Array, mask: Mask, positions_1T: jax.Array) -> jax.Array:
        x_BTD = self.norm_attention(x_BTD + self.attention(x_BTD, mask, positions_1T, None))
        return self.norm_ffn(x_BTD + self.ffn(x_BTD, None))


class BertEncoder(nnx.Module):
    """Word, position and token-type embeddings, their norm, and the layers."""

    def __init__(self, shape: BertShape, *, key: jax.Array) -> None:
        D, init = shape.width, normal(shape.init_std)
        keys = jax.random.split(key, shape.num_layers + 5)
        self.embedding = Embedding("vocab width", shape.vocab_size, D, init=init, key=keys[0])
        self.position = Embedding("position width", shape.max_positions, D, init=init, key=keys[1])
        self.token_type = Embedding("token_type width", shape.token_types, D, init=init, key=keys[2])
        self.norm_embedding = NormLayer("layernorm", D, shape.norm_eps, key=keys[3])
        self.layers = nnx.List(BertLayer(shape, key=key) for key in keys[5:])
        self.pooler = Linear("width out", (D,), (D,), bias=True, init=init, key=keys[4]) if shape.pooler else None

    def __call__(self, tokens_BT: jax.Array, mask_BT: jax.Array, types_BT: jax.Array | None = None) -> jax.Array:
        """The last layer's states [B, T, D], in the dtype of the parameters.

        Args:
            tokens_BT: int32 ids below the vocabulary's size; T at most ``max_positions``.
            mask_BT: bool, True for tokens, False for padding, to which nobody attends.
            types_BT: int32 token types; None: 0 everywhere.
        """
        positions_1T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
        types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
        x_BTD = self.embedding(tokens_BT) + self.position(positions_1T) + self.token_type(types_BT)
        x_BTD = self.norm_embedding(x_BTD)
        for layer in self.layers:
            x_BTD = layer(x_BTD, KeyMask(mask_BT), positions_1T)
        return x_BTD

    def pooled(self, x_BTD: jax.Array) -> jax.Array:
        """BERT's own vector of a text [B, D]: tanh of a projection of its first token's state."""
        assert self.pooler is not None
        return jnp.tanh(self.pooler(x_BTD[:, 0]))


def mean_states(x_BTD: jax.Array, counted_BT: jax.Array) -> jax.Array:
    """The mean of the states of the tokens that count [B, D], float32 (float64 for float64); 0 where none does."""
    weights_BT1 = counted_BT[:, :, None].astype(accumulation_dtype(x_BTD.dtype))
    total_BD = (x_BTD.astype(weights_BT1.dtype) * weights_BT1).sum(1)
    return total_BD / jnp.maximum(weights_BT1.sum(1), 1.0)


def unit_length(x_BD: jax.Array) -> jax.Array:
    """Rows divided by their length; a row of zeros stays."""
    length_B1 = jnp.sqrt((x_BD * x_BD).sum(-1, keepdims=True))
    return x_BD / jnp.where(length_B1 > 0.0, length_B1, 1.0)
