"""Chunked cross-attention (CCA) as a layer: projections, positions, gate and start around the kernel."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retro_jax.config import ModelConfig
from retro_jax.kernels.chunked_cross_attention import chunked_cross_attention
from retro_jax.model.attention import AttentionProjections, BlockShape
from retro_jax.model.grid import reader_positions
from retro_jax.model.layers import Initializer, constant, dropout, parameter, rotate, split_key


class Neighbours(NamedTuple):
    """What CCA reads: encoded neighbours, which of their tokens are valid, and which tokens of the row read at all."""

    encoded_BLKRD: jax.Array
    mask_BLKR: jax.Array
    reads_BT: jax.Array
    segments_BT: jax.Array
    first_chunk_len_B: jax.Array | None


class ChunkedCrossAttention(AttentionProjections):
    """CCA of one decoder layer. Adds exactly 0, bias included, where a token reads nothing."""

    def __init__(self, config: ModelConfig, neighbour_width: int, *, key: jax.Array) -> None:
        retro, shape = config.retro, BlockShape.of_decoder(config)
        assert retro is not None
        start_key, own_key = jax.random.split(key)
        super().__init__(shape, neighbour_width, key=own_key)
        self.shape, self.retro = shape, retro
        width = retro.conv_width
        first = {"standard": 0, "copy": 1}[retro.cca_init]
        decay = {"standard": 0.0, "copy": 0.5}[retro.cca_init]
        key_start, query_start = _falling_taps(first, decay), _falling_taps(0, decay)
        self.key_conv = parameter(start_key, "taps kv_width", (width, neighbour_width), key_start) if width > 1 else None
        self.query_conv = parameter(start_key, "taps width", (width, config.width), query_start) if width > 1 else None
        null, heads = retro.null_key, (config.num_heads,)
        self.null_logit = None if null is None else parameter(start_key, "heads", heads, constant(null))
        self.gate = parameter(start_key, "", (), constant(1.0)) if retro.gate == "learned" else None
        if retro.cca_init == "copy":
            self._start_copying(config, neighbour_width, start_key)

    def __call__(self, x_BTD: jax.Array, neighbours: Neighbours, key: jax.Array | None) -> jax.Array:
        shape, retro, chunk_len = self.shape, self.retro, self.retro.chunks.chunk_len
        B, L, K, R, _ = neighbours.encoded_BLKRD.shape
        T = x_BTD.shape[1]
        weights_key, out_key = split_key(key, 2)
        q_BTNH = self.query(self._mix_queries(x_BTD, neighbours.segments_BT))
        k_XRGH, v_XRGH = self._keys_and_values(neighbours.encoded_BLKRD.reshape(B * L * K, R, -1))
        if retro.cca_positions == "rotary":
            rotary = {"fraction": shape.rotary_fraction, "base": shape.rotary_base, "scale": 1.0}
            q_BTNH = rotate(q_BTNH, reader_positions(T, chunk_len, neighbours.first_chunk_len_B), **rotary)
            k_XRGH = rotate(k_XRGH, jnp.arange(R, dtype=jnp.int32)[None, :], **rotary)
        o_BTNH = chunked_cross_attention(
            q_BTNH,
            k_XRGH.reshape(B, L, K * R, *k_XRGH.shape[2:]),
            v_XRGH.reshape(B, L, K * R, *v_XRGH.shape[2:]),
            neighbours.mask_BLKR.reshape(B, L, K * R),
            None if self.null_logit is None else self.null_logit[...],
            chunk_len=chunk_len,
            first_chunk_len_B=neighbours.first_chunk_len_B,
            dropout=shape.attention_dropout if key is not None else 0.0,
            dropout_key=weights_key,
            implementation=shape.implementation,
        )
        y_BTD = dropout(self.out(o_BTNH), shape.dropout, out_key)
        gate = self.gate[...] if self.gate is not None else jnp.asarray(retro.gate, y_BTD.dtype)
        return jnp.where(neighbours.reads_BT[:, :, None], y_BTD * gate, jnp.zeros_like(y_BTD))

    def _keys_and_values(self, e_XRD: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.key_conv is None:
            kv = self.key_value(e_XRD)
            return kv[:, :, 0], kv[:, :, 1]
        weight, bias = self.key_value.weight[...], None if self.key_value.bias is None else self.key_value.bias[...]
        mixed = causal_convolution(e_XRD, self.key_conv[...], None)
        k, v = jnp.tensordot(mixed, weight[:, 0], 1), jnp.tensordot(e_XRD, weight[:, 1], 1)
        return (k, v) if bias is None else (k + bias[None, None, 0], v + bias[None, None, 1])

    def _mix_queries(self, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        return x_BTD if self.query_conv is None else causal_convolution(x_BTD, self.query_conv[...], segments_BT)

    def _start_copying(self, config: ModelConfig, neighbour_width: int, key: jax.Array) -> None:
        N, H, D = config.num_heads, config.heads_dim, config.width
        if (neighbour_width, N * H, config.kv_heads) != (D, D, N):
            raise ValueError(
                f"RetroConfig.cca_init='copy' needs num_heads x head_dim = encoder width = width and no grouped queries, not "
                f"{N} x {H}, {neighbour_width}, {D} and {config.kv_heads} key/value heads; set cca_init='standard'"
            )
        key_key, value_key = jax.random.split(key)
        keys = jax.random.orthogonal(key_key, D, dtype=jnp.float32).reshape(D, N, H)
        values = jax.random.orthogonal(value_key, D, dtype=jnp.float32)
        self.query.weight[...] = keys
        self.key_value.weight[...] = jnp.stack([keys, values.reshape(D, N, H)], axis=1)
        self.out.weight[...] = self.retro.copy_strength * values.T.reshape(N, H, D)


def causal_convolution(x_XTD: jax.Array, taps_WD: jax.Array, segments_XT: jax.Array | None) -> jax.Array:
    """Depthwise causal convolution: y[t] = sum over w of taps[w] * x[t - w], within a document where segments are given."""
    T = x_XTD.shape[1]
    y = x_XTD * taps_WD[0][None, None]
    for back in range(1, taps_WD.shape[0]):
        shifted = jnp.pad(x_XTD, ((0, 0), (back, 0), (0, 0)))[:, :T]
        if segments_XT is not None:
            same = jnp.pad(segments_XT, ((0, 0), (back, 0)))[:, :T] == segments_XT
            shifted = jnp.where(same[:, :, None], shifted, jnp.zeros_like(shifted))
        y = y + shifted * taps_WD[back][None, None]
    return y


def _falling_taps(first: int, decay: float) -> Initializer:
    """Taps of 1 at ``first``, falling by ``decay`` from there, of length 1."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        taps_W = jnp.asarray([0.0 if w < first else decay ** (w - first) for w in range(shape[0])], jnp.float32)
        return jnp.broadcast_to((taps_W / jnp.sqrt((taps_W * taps_W).sum()))[:, None], shape)

    return init
