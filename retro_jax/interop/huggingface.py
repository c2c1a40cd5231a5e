"""Decoders of Hugging Face's transformers, of Llama's form (also Mistral and Qwen2) and of GPT-2's: tensors and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retro_jax.config import ModelConfig
from retro_jax.errors import UserError
from retro_jax.interop.format import Entry, Format
from retro_jax.interop.layouts import FLAT, GATE_AND_UP, KEY_AND_VALUE, SAME, SIDE_BY_SIDE, matrix
from retro_jax.interop.limits import Limit, hindrances

_LAYER = "model.layers.{layer}."
LLAMA = Format(
    "hf-llama",
    {
        "model.embedding": "model.embed_tokens.",
        "model.output": "lm_head.",
        "model.final_norm": "model.norm.",
        "decoder.norm_attention": _LAYER + "input_layernorm.",
        "decoder.attention": _LAYER + "self_attn.",
        "decoder.norm_ffn": _LAYER + "post_attention_layernorm.",
        "decoder.ffn": _LAYER + "mlp.",
    },
    {
        "table": (Entry(("table",), ("weight",), SAME),),
        "norm": (Entry(("scale",), ("weight",), SAME),),
        "self-attention": (
            Entry(("query.weight",), ("q_proj.weight",), matrix(1)),
            Entry(("query.bias",), ("q_proj.bias",), FLAT),
            Entry(("key_value.weight",), ("k_proj.weight", "v_proj.weight"), KEY_AND_VALUE),
            Entry(("key_value.bias",), ("k_proj.bias", "v_proj.bias"), KEY_AND_VALUE),
            Entry(("out.weight",), ("o_proj.weight",), matrix(2)),
            Entry(("out.bias",), ("o_proj.bias",), SAME),
        ),
        "feed-forward": (
            Entry(("up.weight",), ("gate_proj.weight", "up_proj.weight"), GATE_AND_UP),
            Entry(("up.bias",), ("gate_proj.bias", "up_proj.bias"), GATE_AND_UP),
            Entry(("down.weight",), ("down_proj.weight",), matrix(1)),
            Entry(("down.bias",), ("down_proj.bias",), SAME),
        ),
    },
    (r".*rotary_emb\.inv_freq",),
    "lm_head.weight",
)

_BLOCK = "transformer.h.{layer}."
GPT2 = Format(
    "hf-gpt2",
    {
        "model.embedding": "transformer.wte.",
        "model.position": "transformer.wpe.",
        "model.final_norm": "transformer.ln_f.",
        "decoder.norm_attention": _BLOCK + "ln_1.",
        "decoder.attention": _BLOCK + "attn.",
        "decoder.norm_ffn": _BLOCK + "ln_2.",
        "decoder.ffn": _BLOCK + "mlp.",
    },
    {
        "table": (Entry(("table",), ("weight",), SAME),),
        "positions": (Entry(("table",), ("weight",), SAME),),
        "norm": (Entry(("scale",), ("weight",), SAME), Entry(("bias",), ("bias",), SAME)),
        "self-attention": (
            Entry(("query.weight", "key_value.weight"), ("c_attn.weight",), SIDE_BY_SIDE),
            Entry(("query.bias", "key_value.bias"), ("c_attn.bias",), SIDE_BY_SIDE),
            Entry(("out.weight",), ("c_proj.weight",), matrix(2, out_first=False)),
            Entry(("out.bias",), ("c_proj.bias",), SAME),
        ),
        "feed-forward": (
            Entry(("up.weight",), ("c_fc.weight",), SAME),
            Entry(("up.bias",), ("c_fc.bias",), SAME),
            Entry(("down.weight",), ("c_proj.weight",), SAME),
            Entry(("down.bias",), ("c_proj.bias",), SAME),
        ),
    },
    (r".*\.attn\.(masked_)?bias",),
    "lm_head.weight",
)
FORMATS = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "gpt2": GPT2}


def model_config(theirs: Mapping[str, Any]) -> ModelConfig:
    """Our config of a decoder from its ``config.json``.

    Raises:
        UserError: a setting asks for something that we do not compute; the message names it.
    """
    try:
        return _gpt2_config(theirs) if format_of(theirs) is GPT2 else _llama_config(theirs)
    except KeyError as error:
        raise UserError(f"config.json has no {error.args[0]}") from error


def format_of(theirs: Mapping[str, Any]) -> Format:
    """The names that a model of this ``config.json`` has.

    Raises:
        UserError: it is of another form.
    """
    kind = theirs.get("model_type")
    if kind not in FORMATS:
        raise UserError(f"config.json has model_type={kind!r}; those that can be read are {', '.join(FORMATS)}")
    return FORMATS[kind]


def _llama_config(theirs: Mapping[str, Any]) -> ModelConfig:
    kind = theirs["model_type"]
    # Qwen2 has biases on queries, keys and values without a setting that says so.
    attention_bias, mlp_bias = theirs.get("attention_bias", False), theirs.get("mlp_bias", False)
    rope = _rope(theirs)
    require(theirs, "hidden_act", "silu")
    if kind != "qwen2" and attention_bias != mlp_bias:
        raise UserError(
            f"config.json has attention_bias={attention_bias} and mlp_bias={mlp_bias}; only both or neither can be read"
        )
    if (window := theirs.get("sliding_window")) and theirs.get("use_sliding_window", kind == "mistral"):
        raise UserError(f"config.json has sliding_window={window}; only attention to the whole row can be read")
    return ModelConfig(
        vocab_size=theirs["vocab_size"],
        width=theirs["hidden_size"],
        num_layers=theirs["num_hidden_layers"],
        num_heads=theirs["num_attention_heads"],
        num_kv_heads=theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
        head_dim=theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"],
        ffn_dim=theirs["intermediate_size"],
        norm="rmsnorm",
        norm_eps=theirs["rms_norm_eps"],
        positions="rotary",
        rotary_base=rope["base"],
        rotary_scale=rope["scale"],
        max_positions=theirs.get("max_position_embeddings", 2048),
        activation="swiglu",
        linear_bias=bool(mlp_bias),
        qkv_bias=True if kind == "qwen2" else None,
        tied_embedding=bool(theirs.get("tie_word_embeddings", False)),
        retro=None,
    )


def _rope(theirs: Mapping[str, Any]) -> dict[str, float]:
    """Base and scale of the rotary positions, from either generation of config.json."""
    given = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UserError(f"config.json has rotary positions of type {kind!r}; those that can be read are default and linear")
    base = given.get("rope_theta", theirs.get("rope_theta", 10_000.0))
    return {"base": float(base), "scale": float(given.get("factor", 1.0)) if kind == "linear" else 1.0}


def _gpt2_config(theirs: Mapping[str, Any]) -> ModelConfig:
    if theirs.get("activation_function") not in ("gelu_new", "gelu_pytorch_tanh", "gelu"):
        raise UserError(
            f"config.json has activation_function={theirs.get('activation_function')!r}; gelu and gelu_new can be read"
        )
    for name, value in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):
        require(theirs, name, value)
    return ModelConfig(
        vocab_size=theirs["vocab_size"],
        width=theirs["n_embd"],
        num_layers=theirs["n_layer"],
        num_heads=theirs["n_head"],
        ffn_dim=theirs.get("n_inner") or 4 * theirs["n_embd"],
        norm="layernorm",
        norm_eps=theirs["layer_norm_epsilon"],
        positions="learned",
        max_positions=theirs["n_positions"],
        activation="gelu" if theirs["activation_function"] == "gelu" else "gelu_tanh",
        linear_bias=True,
        tied_embedding=bool(theirs.get("tie_word_embeddings", True)),
        retro=None,
    )


def require(theirs: Mapping[str, Any], name: str, value: object) -> None:
    """Refuse a ``config.json`` in which a setting has another value than the one that can be read (which its absence means)."""
    if (given := theirs.get(name, value)) != value:
        raise UserError(f"config.json has {name}={given!r}; only {value!r} can be read")


def hugging_face_config(ours: ModelConfig) -> dict[str, Any]:
    """``config.json`` of a GPT: Llama's form, Qwen2's or GPT-2's, whichever computes it.

    Raises:
        UserError: none does; the message names the settings that stand in the way of each.
    """
    if ours.retro is not None:
        raise UserError("Hugging Face has no decoder with chunked cross-attention; export the backbone (ModelConfig.retro=None)")
    if not (llama := _wanted(ours, LLAMA_LIMITS)):
        return _theirs_llama(ours)
    if not (gpt2 := _wanted(ours, GPT2_LIMITS)):
        return _theirs_gpt2(ours)
    raise UserError(f"no decoder of Hugging Face computes this model: Llama's form needs {llama}; GPT-2's form needs {gpt2}")


_ALIKE = (Limit("ModelConfig.final_norm", lambda c: c.final_norm, (True,)),)
# What the forms compute.
LLAMA_LIMITS = (
    Limit("ModelConfig.norm", lambda c: c.norm, ("rmsnorm",)),
    Limit("ModelConfig.positions", lambda c: c.positions, ("rotary",)),
    Limit("ModelConfig.rotary_fraction", lambda c: c.rotary_fraction, (1.0,)),
    Limit("ModelConfig.activation", lambda c: c.activation, ("swiglu",)),
    Limit("ModelConfig.qkv_bias", lambda c: c.qkv_bias, lambda c: (None, True) if c.linear_bias else (None, True, False)),
    *_ALIKE,
)
GPT2_LIMITS = (
    Limit("ModelConfig.norm", lambda c: c.norm, ("layernorm",)),
    Limit("ModelConfig.positions", lambda c: c.positions, ("learned",)),
    Limit("ModelConfig.activation", lambda c: c.activation, ("gelu", "gelu_tanh")),
    Limit("ModelConfig.linear_bias", lambda c: c.linear_bias, (True,)),
    Limit("ModelConfig.qkv_bias", lambda c: c.qkv_bias, (None, True)),
    Limit("ModelConfig.tied_embedding", lambda c: c.tied_embedding, (True,)),
    Limit("ModelConfig.num_kv_heads", lambda c: c.kv_heads, lambda c: (c.num_heads,)),
    Limit("ModelConfig.head_dim", lambda c: c.heads_dim, lambda c: (c.width / c.num_heads,)),
    *_ALIKE,
)


def _wanted(config: ModelConfig, limits: tuple[Limit, ...]) -> str:
    return ", ".join(f"{name}={allowed[0]!r} (not {value!r})" for name, value, allowed in hindrances(config, limits))


def _theirs_llama(ours: ModelConfig) -> dict[str, Any]:
    qwen = ours.qkv_bias is True and not ours.linear_bias
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": ours.rotary_base}
    if ours.rotary_scale != 1.0:
        rope = {"rope_type": "linear", "rope_theta": ours.rotary_base, "factor": ours.rotary_scale}
    config = {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.width,
        "intermediate_size": ours.ffn_width,
        "num_hidden_layers": ours.num_layers,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.kv_heads,
        "head_dim": ours.heads_dim,
        "hidden_act": "silu",
        "rms_norm_eps": ours.norm_eps,
        "max_position_embeddings": ours.max_positions,
        "rope_parameters": rope,
        "rope_theta": ours.rotary_base,
        "tie_word_embeddings": ours.tied_embedding,
        "attention_dropout": ours.attention_dropout,
    }
    if ours.rotary_scale != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "type": "linear", "factor": ours.rotary_scale}
    return config if qwen else {**config, "attention_bias": ours.linear_bias, "mlp_bias": ours.linear_bias}


def _theirs_gpt2(ours: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": ours.vocab_size,
        "n_embd": ours.width,
        "n_inner": ours.ffn_width,
        "n_layer": ours.num_layers,
        "n_head": ours.num_heads,
        "n_positions": ours.max_positions,
        "layer_norm_epsilon": ours.norm_eps,
        "activation_function": "gelu" if ours.activation == "gelu" else "gelu_new",
        "tie_word_embeddings": True,
        "attn_pdrop": ours.attention_dropout,
        "embd_pdrop": ours.dropout,
        "resid_pdrop": ours.dropout,
    }
