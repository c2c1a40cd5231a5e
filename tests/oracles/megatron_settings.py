"""A Megatron fixture's settings and inputs in our terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from retro_jax.config import ChunkConfig, EncoderConfig, ModelConfig, RetroConfig
from retro_jax.data.batch import Batch
from retro_jax.model.grid import trailing_first_chunk_len

ACTIVATIONS = {"gelu_erf": "gelu", "gelu_tanh": "gelu_tanh", "swiglu": "swiglu", "squared_relu": "squared_relu"}
RESIDUALS = {"normalised": "normed", "unnormalised": "stream"}


def config_of_settings(settings: Mapping[str, Any]) -> ModelConfig:
    """Our config of ``meta_json.resolved``."""
    norm = "layernorm1p" if settings["zero_centered_gamma"] else "layernorm"
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        width=settings["hidden_size"],
        num_layers=settings["num_layers"],
        num_heads=settings["num_heads"],
        num_kv_heads=settings.get("num_query_groups") or settings["num_heads"],
        head_dim=settings["head_dim"],
        ffn_dim=settings["ffn_hidden_size"],
        norm="rmsnorm" if settings["normalization"] == "RMSNorm" else norm,  # type: ignore[arg-type]
        norm_eps=settings["norm_epsilon"],
        positions=settings["positions"],
        max_positions=settings["max_positions"] or settings["sequence_length"],
        rotary_fraction=settings["rotary_percent"] or 1.0,
        rotary_base=settings["rotary_base"] or 10_000.0,
        activation=ACTIVATIONS[settings["activation"]],  # type: ignore[arg-type]
        linear_bias=settings["linear_bias"],
        tied_embedding=settings["tied_embeddings"],
        final_norm=settings["final_norm"],
        retro=_retro(settings) if settings.get("retro_layers_1based") else None,
    )


def _retro(settings: Mapping[str, Any]) -> RetroConfig:
    return RetroConfig(
        chunks=ChunkConfig(
            chunk_len=settings["chunk_length"],
            num_neighbours=settings["num_neighbours"],
            retrieved_len=settings["retrieved_length"],
        ),
        encoder=EncoderConfig(
            num_layers=settings["encoder_layers"],
            positions=settings["encoder_positions"],
            cross_residual=RESIDUALS[settings["encoder_cross_attention_residual"]],  # type: ignore[arg-type]
            padding="attended",
        ),
        cca_layers=tuple(settings["retro_layers_1based"]),
        cca_positions="none",
        gate=settings["gate"],
        cross_document=settings["cross_document_cca"],
    )


def megatron_batch(arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Batch:
    """The inputs: the first chunk is the short one, all neighbour tokens count, and labels are used as they are."""
    tokens = arrays["in/input_ids"].astype(np.int32)
    rows, length = tokens.shape
    retro = bool(settings.get("retro_layers_1based"))
    chunk_len = settings["chunk_length"] if retro else 1
    shape = (
        rows,
        -(-length // chunk_len),
        settings["num_neighbours"] if retro else 0,
        settings["retrieved_length"] if retro else 1,
    )
    neighbours = arrays["in/context_input_ids"].astype(np.int32).reshape(shape) if retro else np.zeros(shape, np.int32)
    segments = (
        _segments(arrays["in/attention_mask"], rows) if settings["document_reset_mask"] else np.ones((rows, length), np.int32)
    )
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    if settings["positions"] == "learned":  # rotary positions count through the row in any case
        positions = np.broadcast_to(arrays["in/position_ids"].astype(np.int32), (rows, length))
    return Batch(
        tokens=tokens,
        targets=arrays["in/labels"].astype(np.int32),
        segments=segments,
        positions=np.ascontiguousarray(positions),
        loss_mask=arrays["in/loss_mask"].astype(np.float32),
        neighbours=neighbours,
        neighbour_mask=np.ones(shape, bool),
        first_chunk_len=np.full(rows, trailing_first_chunk_len(length, chunk_len), np.int32) if retro else None,
    )


def _segments(masked_B1TT: np.ndarray, rows: int) -> np.ndarray:
    """Documents of a mask that is reset at their borders: a token's is named by the first token that it sees."""
    length = masked_B1TT.shape[-1]
    first_seen = (~masked_B1TT.astype(bool)).argmax(axis=-1).reshape(-1, length)
    starts = np.concatenate([np.ones((len(first_seen), 1), bool), np.diff(first_seen, axis=1) != 0], axis=1)
    return np.broadcast_to(np.cumsum(starts, axis=1), (rows, length)).astype(np.int32)
