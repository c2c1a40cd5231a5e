"""The neighbour encoder: bidirectional layers over each neighbour, conditioned on the chunk that asks (RETRO, section 2.3)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retro_jax.config import EncoderConfig, ModelConfig
from retro_jax.kernels.attention import KeyMask, Mask
from retro_jax.model.attention import BlockShape, CrossAttention, FeedForward, SelfAttention
from retro_jax.model.layers import Embedding, Noise, NormLayer, dropout, normal, parts
from retro_jax.parallel.recompute import recomputed


def encoder_shape(config: ModelConfig) -> BlockShape:
    """The shape of the encoder's layers: the decoder's, where EncoderConfig does not say otherwise."""
    assert config.retro is not None
    encoder, decoder = config.retro.encoder, BlockShape.of_decoder(config)
    width, heads = encoder.width or decoder.width, encoder.num_heads or decoder.num_heads
    own_heads = encoder.width is not None or encoder.num_heads is not None
    if own_heads and width % heads:
        raise ValueError(f"EncoderConfig.width={width} is not divisible by num_heads={heads}")
    return dataclasses.replace(
        decoder,
        width=width,
        num_heads=heads,
        kv_heads=heads if own_heads else decoder.kv_heads,
        head_dim=width // heads if own_heads else decoder.head_dim,
        ffn_dim=encoder.ffn_dim or (4 * width if encoder.width else decoder.ffn_dim),
        positions=encoder.positions,
        rotary_scale=1.0,  # interpolation is for longer rows; neighbours keep their length
        dropout=encoder.dropout,
        attention_dropout=encoder.attention_dropout,
    )


class EncoderLayer(nnx.Module):
    """Self-attention within a neighbour, with ``conditioned`` cross-attention to the chunk that asks, feed-forward."""

    def __init__(self, config: ModelConfig, encoder: EncoderConfig, *, conditioned: bool, key: jax.Array) -> None:
        shape = encoder_shape(config)
        keys = jax.random.split(key, 6)
        self.cross_residual, self.recompute = encoder.cross_residual, shape.recompute
        self.norm_attention = NormLayer(config.norm, shape.width, config.norm_eps, key=keys[0])
        self.attention = SelfAttention(shape, key=keys[1])
        self.norm_cross = NormLayer(config.norm, shape.width, config.norm_eps, key=keys[2]) if conditioned else None
        cross_dropout = config.attention_dropout  # Megatron: the decoder's, not the encoder's
        self.cross = CrossAttention(shape, config.width, attention_dropout=cross_dropout, key=keys[3]) if conditioned else None
        self.norm_ffn = NormLayer(config.norm, shape.width, config.norm_eps, key=keys[4])
        self.ffn = FeedForward(shape, key=keys[5])

    def __call__(
        self,
        e_XRD: jax.Array,
        mask: Mask | None,
        positions_1R: jax.Array,
        chunks_YCD: jax.Array | None,
        chunk_mask: Mask | None,
        noise: Noise | None,
    ) -> jax.Array:
        noises = parts(noise, 3)
        e_XRD = e_XRD + self.attention(self.norm_attention(e_XRD), mask, positions_1R, noises[0])
        e_XRD = checkpoint_name(e_XRD, "after_attention")
        if self.cross is not None and self.norm_cross is not None:
            assert chunks_YCD is not None
            X, R, D = e_XRD.shape
            Y = chunks_YCD.shape[0]
            y_XRD = self.norm_cross(e_XRD)
            # The K neighbours of a chunk share its states: their tokens are the queries of one problem.
            y_YQD = y_XRD.reshape(Y, X // Y * R, D)
            read = self.cross(y_YQD, chunks_YCD, chunk_mask, _of_chunks(noises[1], Y))
            e_XRD = (y_XRD if self.cross_residual == "normed" else e_XRD) + read.reshape(X, R, D)
            e_XRD = checkpoint_name(e_XRD, "after_cca")
        return e_XRD + self.ffn(self.norm_ffn(e_XRD), noises[2])


def _of_chunks(noise: Noise | None, chunks: int) -> Noise | None:
    """The noise of neighbours' tokens, where all of a chunk's neighbours make one problem; the order of all tokens is the one in
    which the devices' shares are gathered."""
    if noise is None:
        return None
    own, R = noise.own_XT.shape[1], noise.all_XT.shape[1]
    shares = noise.all_XT.reshape(chunks, -1, R // own, own).swapaxes(1, 2)
    return noise._replace(own_XT=noise.own_XT.reshape(chunks, -1), all_XT=shares.reshape(chunks, -1))


class NeighbourEncoder(nnx.Module):
    """Encodes every neighbour [R tokens] of every chunk, given the decoder's states of that chunk."""

    def __init__(self, config: ModelConfig, *, key: jax.Array) -> None:
        assert config.retro is not None
        encoder = config.retro.encoder
        shape = encoder_shape(config)
        keys = jax.random.split(key, encoder.num_layers + 3)
        self.config = encoder
        init, length = normal(config.init_std), config.retro.chunks.retrieved_len
        own = encoder.embedding == "own"
        own_positions = encoder.positions == "learned" and (own or config.positions != "learned")
        assert config.vocab_size is not None
        self.embedding = Embedding("vocab width", config.vocab_size, shape.width, init=init, key=keys[0]) if own else None
        self.position = Embedding("position width", length, shape.width, init=init, key=keys[1]) if own_positions else None
        self.layers = nnx.List(
            EncoderLayer(config, encoder, conditioned=encoder.conditioning == "decoder" and i == 0, key=keys[i + 3])
            for i in range(encoder.num_layers)
        )
        self.final_norm = NormLayer(config.norm, shape.width, config.norm_eps, key=keys[2]) if encoder.final_norm else None

    @property
    def reads_chunks(self) -> bool:
        """Whether a layer is conditioned on the decoder's states."""
        return any(layer.cross is not None for layer in self.layers)

    def __call__(
        self,
        embedded_BLKRD: jax.Array,
        mask_BLKR: jax.Array,
        chunks_BLCD: jax.Array | None,
        chunk_mask_BLC: jax.Array,
        noise: Noise | None,
        *,
        alone: bool = False,
    ) -> jax.Array:
        """Encode embedded neighbours, [B, L, K, R, D] to the same shape.

        Args:
            embedded_BLKRD: this device's share of each neighbour's tokens.
            mask_BLKR: valid neighbour tokens, of whole neighbours.
            chunks_BLCD: the decoder's normed states at the first CCA layer, chunk by chunk; None where no layer reads them.
            chunk_mask_BLC: valid tokens of a chunk.
            noise: for dropout.
            alone: these are chunks of this device's own and whole neighbours; nothing but weights is exchanged.
        """
        B, L, K, R = mask_BLKR.shape
        noises = parts(noise, len(self.layers) + 1)
        positions_1R = jnp.arange(R, dtype=jnp.int32)[None, :]
        e = embedded_BLKRD.reshape(B * L * K, *embedded_BLKRD.shape[3:])
        if self.position is not None:
            e = e + self.position(positions_1R, share=None if alone else -1)
        e = dropout(e, self.config.dropout, noises[0])
        masked = self.config.padding == "masked"
        mask = KeyMask(mask_BLKR.reshape(B * L * K, R)) if masked else None
        chunks = None if chunks_BLCD is None else chunks_BLCD.reshape(B * L, *chunks_BLCD.shape[2:])
        chunk_mask = KeyMask(chunk_mask_BLC.reshape(B * L, -1)) if masked else None
        for layer, own in zip(self.layers, noises[1:], strict=True):
            if alone:
                layer = nnx.merge(*nnx.split(layer))
                layer.set_attributes(alone=True)
            e = recomputed(layer, layer.recompute)(e, mask, positions_1R, chunks, chunk_mask, own)
        if self.final_norm is not None:
            e = self.final_norm(e)
        return e.reshape(embedded_BLKRD.shape)
