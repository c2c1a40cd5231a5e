"""How many floating-point operations a model's matrix products take, and how many a device can do."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from retro_jax.config import ModelConfig
from retro_jax.model.attention import BlockShape
from retro_jax.model.encoder import encoder_shape

# Dense bfloat16 peaks without sparsity, from the vendors' data sheets, by the start of jax.Device.device_kind; longest first.
PEAK_BFLOAT16 = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}


def train_flops(config: ModelConfig, *, rows: int, seq_len: int, neighbours: int, share: float = 1.0) -> float:
    """Operations of one training step: forward, and twice as many backward (PaLM, appendix B); recomputation is not counted.

    Args:
        rows: B.
        seq_len: T.
        neighbours: K, neighbours a chunk in the batch; 0 where it is read without.
        share: of the chunks whose neighbours are encoded and read.
    """
    return 3.0 * forward_flops(config, rows=rows, seq_len=seq_len, neighbours=neighbours, share=share)


def forward_flops(config: ModelConfig, *, rows: int, seq_len: int, neighbours: int, share: float = 1.0) -> float:
    """2 M N K for every matrix product of the forward pass; attention counts all T x T pairs, also those that the mask hides."""
    tokens, shape = rows * seq_len, BlockShape.of_decoder(config)
    assert config.vocab_size is not None
    total = tokens * config.num_layers * (_self_attention(shape, seq_len) + _feed_forward(shape))
    total += tokens * 2.0 * config.width * config.vocab_size
    if config.retro is None or config.retro.gate == 0.0 or neighbours == 0:
        return total
    chunks = config.retro.chunks
    encoder, read = encoder_shape(config), neighbours * chunks.retrieved_len
    neighbour_tokens = share * rows * (seq_len // chunks.chunk_len) * read
    total += tokens * len(config.cca_layers) * (_query_and_out(shape) + share * _pairs(shape, read))
    total += neighbour_tokens * len(config.cca_layers) * _key_value(shape, encoder.width)
    layers = config.retro.encoder.num_layers
    total += neighbour_tokens * layers * (_self_attention(encoder, chunks.retrieved_len) + _feed_forward(encoder))
    if layers > 0 and config.retro.encoder.conditioning == "decoder":
        total += neighbour_tokens * (_query_and_out(encoder) + _pairs(encoder, chunks.chunk_len))
        total += share * tokens * _key_value(encoder, config.width)
    return total


def peak_flops(dtype: jnp.dtype) -> float | None:
    """Operations a second that the device can do in ``dtype``; None where that is not known."""
    if dtype != jnp.bfloat16:
        return None
    kind = jax.devices()[0].device_kind
    return next((peak for start, peak in PEAK_BFLOAT16.items() if kind.startswith(start)), None)


def _query_and_out(shape: BlockShape) -> float:
    return 2.0 * 2 * shape.width * shape.num_heads * shape.head_dim


def _key_value(shape: BlockShape, width: int) -> float:
    return 2.0 * 2 * width * shape.kv_heads * shape.head_dim


def _pairs(shape: BlockShape, length: int) -> float:
    return 2.0 * 2 * length * shape.num_heads * shape.head_dim


def _self_attention(shape: BlockShape, length: int) -> float:
    return _query_and_out(shape) + _key_value(shape, shape.width) + _pairs(shape, length)


def _feed_forward(shape: BlockShape) -> float:
    return 2.0 * (3 if shape.activation == "swiglu" else 2) * shape.width * shape.ffn_dim
