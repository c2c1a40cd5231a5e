"""Megatron-LM: Retro and GPT of Megatron core (local and Transformer Engine layers) and of the legacy classes (InstructRetro)."""

from __future__ import annotations

import dataclasses

from retro_jax.config import ModelConfig
from retro_jax.errors import UserError
from retro_jax.interop import MEGATRON_CORE, MEGATRON_LEGACY, MEGATRON_TE
from retro_jax.interop.format import Entry, Format
from retro_jax.interop.layouts import BY_GROUP, BY_HEAD, FLAT, GATED_BIAS, GATED_OUT, SAME, matrix
from retro_jax.interop.limits import Limit, hindrances

NORM = (Entry(("scale",), ("weight",), SAME), Entry(("bias",), ("bias",), SAME))
TABLES = {
    "table": (Entry(("table",), ("weight",), SAME, "vocabulary"),),
    "positions": (Entry(("table",), ("weight",), SAME),),
}


def _rows(qkv: str, q: str, kv: str, out: str, up: str, down: str) -> dict[str, tuple[Entry, ...]]:
    """The tables of the modules whose tensors are named alike in all versions, from the names that differ."""
    out_rows = (
        Entry(("out.weight", "gate"), (f"{out}.weight",), GATED_OUT, "columns"),
        Entry(("out.weight",), (f"{out}.weight",), matrix(2), "columns"),
        Entry(("out.bias", "gate"), (f"{out}.bias",), GATED_BIAS),
        Entry(("out.bias",), (f"{out}.bias",), SAME),
    )
    return {
        "norm": NORM,
        **TABLES,
        "self-attention": (
            Entry(("query.weight", "key_value.weight"), (f"{qkv}.weight",), BY_GROUP, "rows"),
            Entry(("query.bias", "key_value.bias"), (f"{qkv}.bias",), BY_GROUP, "rows"),
            *out_rows,
        ),
        "cross-attention": (
            Entry(("query.weight",), (f"{q}.weight",), matrix(1), "rows"),
            Entry(("query.bias",), (f"{q}.bias",), FLAT, "rows"),
            Entry(("key_value.weight",), (f"{kv}.weight",), BY_HEAD, "rows"),
            Entry(("key_value.bias",), (f"{kv}.bias",), BY_HEAD, "rows"),
            *out_rows,
        ),
        "feed-forward": (
            Entry(("up.weight",), (f"{up}.weight",), matrix(1), "rows of halves"),
            Entry(("up.bias",), (f"{up}.bias",), FLAT, "rows of halves"),
            Entry(("down.weight",), (f"{down}.weight",), matrix(1), "columns"),
            Entry(("down.bias",), (f"{down}.bias",), SAME),
        ),
    }


_ENCODER = "decoder.layers.{first}.cross_attention.encoder.layers.{layer}."
_CORE = {
    "model.embedding": "embedding.word_embeddings.",
    "model.position": "embedding.position_embeddings.",
    "model.output": "output_layer.",
    "model.final_norm": "decoder.final_layernorm.",
    "decoder.norm_attention": "decoder.layers.{layer}.input_layernorm.",
    "decoder.attention": "decoder.layers.{layer}.self_attention.",
    "decoder.norm_cca": "decoder.layers.{layer}.pre_cross_attn_layernorm.",
    "decoder.cca": "decoder.layers.{layer}.cross_attention.attn.",
    "decoder.norm_ffn": "decoder.layers.{layer}.pre_mlp_layernorm.",
    "decoder.ffn": "decoder.layers.{layer}.mlp.",
    "encoder.norm_attention": _ENCODER + "input_layernorm.",
    "encoder.attention": _ENCODER + "self_attention.",
    "encoder.norm_cross": _ENCODER + "pre_cross_attn_layernorm.",
    "encoder.cross": _ENCODER + "cross_attention.attn.",
    "encoder.norm_ffn": _ENCODER + "pre_mlp_layernorm.",
    "conditioned encoder.norm_ffn": _ENCODER + "pre_mlp_layernorm.norm.",
    "encoder.ffn": _ENCODER + "mlp.",
}
_NOT_WEIGHTS = (r".*\._extra_state.*", r".*rotary_pos_emb\.inv_freq", r"(optimizer|opt_param_scheduler|rng_state|rerun_state).*")

CORE = Format(
    MEGATRON_CORE,
    _CORE,
    _rows(qkv="linear_qkv", q="linear_q", kv="linear_kv", out="linear_proj", up="linear_fc1", down="linear_fc2"),
    _NOT_WEIGHTS,
)

# Transformer Engine fuses a norm with the linear layer behind it, but for the norm that the encoder's first layer wraps.
TRANSFORMER_ENGINE = Format(
    MEGATRON_TE,
    {
        **_CORE,
        "decoder.norm_attention": "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_",
        "decoder.norm_ffn": "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_",
        "encoder.norm_attention": _ENCODER + "self_attention.linear_qkv.layer_norm_",
        "encoder.norm_ffn": _ENCODER + "mlp.linear_fc1.layer_norm_",
    },
    CORE.tables,
    _NOT_WEIGHTS,
)

_LAYER = "language_model.encoder.layers.{layer}."
_RETRIEVER = "language_model.encoder.layers.{first}.retriever.layers.{layer}."
LEGACY = Format(
    MEGATRON_LEGACY,
    {
        "model.embedding": "language_model.embedding.word_embeddings.",
        "model.position": "language_model.embedding.position_embeddings.",
        "model.output": "language_model.output_layer.",
        "model.final_norm": "language_model.encoder.final_norm.",
        "decoder.norm_attention": _LAYER + "input_norm.",
        "decoder.attention": _LAYER + "self_attention.",
        "decoder with cca.norm_cca": _LAYER + "post_attention_norm.",
        "decoder with cca.cca": _LAYER + "inter_attention.",
        "decoder with cca.norm_ffn": _LAYER + "post_inter_attention_norm.",
        "decoder.norm_ffn": _LAYER + "post_attention_norm.",
        "decoder.ffn": _LAYER + "mlp.",
        "encoder.norm_attention": _RETRIEVER + "input_norm.",
        "encoder.attention": _RETRIEVER + "self_attention.",
        "conditioned encoder.norm_cross": _RETRIEVER + "post_attention_norm.",
        "conditioned encoder.cross": _RETRIEVER + "inter_attention.",
        "conditioned encoder.norm_ffn": _RETRIEVER + "post_inter_attention_norm.",
        "encoder.norm_ffn": _RETRIEVER + "post_attention_norm.",
        "encoder.ffn": _RETRIEVER + "mlp.",
    },
    _rows(
        qkv="query_key_value",
        q="query",
        kv="key_value",
        out="dense",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
    ),
    _NOT_WEIGHTS,
)


_BOTH = (
    Limit("ModelConfig.rotary_scale", lambda c: c.rotary_scale, (1.0,)),
    Limit("ModelConfig.num_kv_heads", lambda c: c.kv_heads, lambda c: (c.kv_heads if c.retro is None else c.num_heads,)),
    Limit("RetroConfig.cca_positions", lambda c: c.retro.cca_positions, ("none",)),
    Limit("RetroConfig.conv_width", lambda c: c.retro.conv_width, (1,)),
    Limit("RetroConfig.null_key", lambda c: c.retro.null_key, (None,)),
    # A learned gate is folded into the output projection.
    Limit("RetroConfig.gate", lambda c: c.retro.gate, (1.0, "learned")),
    Limit("EncoderConfig.num_layers", lambda c: min(c.retro.encoder.num_layers, 1), (1,)),
    Limit("EncoderConfig.width", lambda c: c.retro.encoder.width, (None,)),
    Limit("EncoderConfig.num_heads", lambda c: c.retro.encoder.num_heads, (None,)),
    Limit("EncoderConfig.ffn_dim", lambda c: c.retro.encoder.ffn_dim, (None,)),
    Limit("EncoderConfig.embedding", lambda c: c.retro.encoder.embedding, ("shared",)),
    Limit("EncoderConfig.conditioning", lambda c: c.retro.encoder.conditioning, ("decoder",)),
    Limit("EncoderConfig.final_norm", lambda c: c.retro.encoder.final_norm, (False,)),
    Limit(
        "EncoderConfig.positions",
        lambda c: c.retro.encoder.positions,
        lambda c: ("learned" if c.positions == "learned" else "none",),
    ),
)
_CORE_ONLY = (Limit("EncoderConfig.cross_residual", lambda c: c.retro.encoder.cross_residual, ("normed",)),)
_LEGACY_ONLY = (
    Limit("EncoderConfig.cross_residual", lambda c: c.retro.encoder.cross_residual, ("stream",)),
    Limit("ModelConfig.qkv_bias", lambda c: c.qkv_bias, lambda c: (None, c.linear_bias)),
)
# What Megatron computes.
LIMITS = {
    CORE.name: _BOTH + _CORE_ONLY,
    TRANSFORMER_ENGINE.name: _BOTH + _CORE_ONLY,
    LEGACY.name: _BOTH + _LEGACY_ONLY,
}


def refuse_for_megatron(config: ModelConfig, target: Format) -> None:
    """Refuse what Megatron's code does not compute.

    Raises:
        UserError: the settings that hinder it are named.
    """
    if found := hindrances(config, LIMITS[target.name]):
        told = ", ".join(f"{name}={value!r}, only {allowed[0]!r}" for name, value, allowed in found)
        raise UserError(f"{target.name} cannot compute {told}")


def as_stored(config: ModelConfig) -> ModelConfig:
    """The config of what is written: a learned gate is part of the output projection there."""
    if config.retro is None or config.retro.gate != "learned":
        return config
    return dataclasses.replace(config, retro=dataclasses.replace(config.retro, gate=1.0))


def megatron_warnings(config: ModelConfig) -> list[str]:
    """What Megatron computes otherwise, on padding and at borders of documents."""
    if config.retro is None:
        return []
    told = []
    if config.retro.encoder.padding == "masked":
        told.append("Megatron attends to padding in neighbours; this model was trained with it hidden (EncoderConfig.padding)")
    if not config.retro.cross_document:
        told.append(
            "Megatron reads neighbours of the document before at its border; this model does not (RetroConfig.cross_document)"
        )
    return told
