"""Settings of the model: decoder, chunked cross-attention and neighbour encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from retro_jax.config.checks import check, check_choice, check_fraction, check_positive
from retro_jax.config.data import ChunkConfig
from retro_jax.config.recompute import RecomputePolicy, check_recompute

Norm = Literal["layernorm", "layernorm1p", "rmsnorm"]
Positions = Literal["rotary", "learned", "none"]
Activation = Literal["gelu", "gelu_tanh", "relu", "squared_relu", "swiglu"]
Implementation = Literal["reference", "xla", "triton"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The neighbour encoder: bidirectional layers, the first conditioned on the decoder's states of the chunk that asks.

    ``width``/``num_heads``/``ffn_dim`` None: as the decoder. ``embedding``: the decoder's table, or its own.
    ``conditioning``: "decoder" states at the first CCA layer, or "none". ``cross_residual``: "stream" adds the encoder's
    cross-attention to the un-normed stream (RETRO, Megatron legacy), "normed" to the normed one (Megatron core).
    ``padding``: "masked" hides padding from attention; "attended" is Megatron's behaviour.
    ``division``: how the devices along ``MeshConfig.tensor`` share the encoder. "heads": as the decoder, some heads and columns
    each. "chunks": each encodes the neighbours of some chunks, with weights gathered layer by layer. "auto": the one that
    sends less, "heads" where the chunks do not divide.
    """

    num_layers: int = 2
    width: int | None = None
    num_heads: int | None = None
    ffn_dim: int | None = None
    embedding: Literal["shared", "own"] = "shared"
    positions: Positions = "rotary"
    conditioning: Literal["decoder", "none"] = "decoder"
    cross_residual: Literal["stream", "normed"] = "stream"
    padding: Literal["masked", "attended"] = "masked"
    final_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    division: Literal["auto", "heads", "chunks"] = "auto"

    def __post_init__(self) -> None:
        check(self.num_layers >= 0, f"EncoderConfig.num_layers={self.num_layers} must not be negative")
        for name in ("width", "num_heads", "ffn_dim"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check_choice(self, "embedding", ("shared", "own"))
        check_choice(self, "positions", get_args(Positions))
        check_choice(self, "conditioning", ("decoder", "none"))
        check_choice(self, "cross_residual", ("stream", "normed"))
        check_choice(self, "padding", ("masked", "attended"))
        check_choice(self, "division", ("auto", "heads", "chunks"))
        check_fraction(self, "dropout", "attention_dropout")
        check(
            self.embedding == "own" or self.width is None,
            "EncoderConfig.width differs from the decoder's, so the embedding cannot be shared; "
            "set EncoderConfig.embedding='own'",
        )


@dataclass(frozen=True, kw_only=True)
class RetroConfig:
    """Chunked cross-attention (CCA): where, how it starts and how it is gated.

    ``cca_layers`` is 1-based; None: ``range(6 if num_layers <= 15 else 9, num_layers + 1, 3)``, the published rule.
    ``gate``: a fixed factor on the CCA output (0: nothing of the retrieval path is computed), or "learned" (one scalar a
    layer, from 1). ``conv_width``: queries and keys of CCA mix a token with its predecessors (depthwise causal convolution;
    1: none). ``cca_init``: "copy" starts with query = key projection, keys that carry the previous token where there is a
    convolution, and output = ``copy_strength`` times the inverse of the value projection, so that attention to a matching
    token predicts its successor. ``null_key``: a learned logit a head for attending to nothing, and where it starts: at a large
    one CCA starts almost silent; None: CCA always attends to some neighbour. ``neighbour_dropout``: share of chunks whose
    neighbours are hidden in training. ``cross_document``: CCA may read neighbours of the previous document in the row
    (Megatron).
    """

    chunks: ChunkConfig = field(default_factory=ChunkConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    cca_layers: tuple[int, ...] | None = None
    cca_positions: Literal["rotary", "none"] = "rotary"
    cca_init: Literal["standard", "copy"] = "standard"
    copy_strength: float = 1.0
    conv_width: int = 1
    null_key: float | None = None
    gate: float | Literal["learned"] = 1.0
    neighbour_dropout: float = 0.0
    cross_document: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "cca_positions", ("rotary", "none"))
        check_choice(self, "cca_init", ("standard", "copy"))
        check_positive(self, "conv_width", "copy_strength")
        check_fraction(self, "neighbour_dropout")
        check(
            not isinstance(self.gate, str) or self.gate == "learned",
            f"RetroConfig.gate={self.gate!r} is neither a number nor 'learned'",
        )
        if self.cca_layers is not None:
            check(len(self.cca_layers) > 0, "RetroConfig.cca_layers is empty; for a plain GPT set ModelConfig.retro = None")
            check(
                list(self.cca_layers) == sorted(set(self.cca_layers)) and self.cca_layers[0] >= 1,
                f"RetroConfig.cca_layers={self.cca_layers} must be ascending, without repeats, from 1",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of GPT or Llama form; with ``retro`` a Retro, without (None) its GPT twin.

    ``vocab_size`` None: the tokenizer's, rounded up to a multiple of ``vocab_multiple``. ``num_kv_heads`` None: as many as
    heads (MHA). ``head_dim`` None: ``width // num_heads``. ``ffn_dim`` None: 4 x width. ``rotary_fraction`` is the share of a
    head's dims that rotate, ``rotary_scale`` divides positions (linear interpolation). ``qkv_bias``: biases of queries, keys and
    values; None: as ``linear_bias`` (Qwen2 has these alone).

    ``recompute``: what of a layer the backward pass computes again to save memory. "none": norms. "selective": what is cheap:
    scores and weights of attention, norms, activations. "full": the whole layer. "offload": as selective, what is saved lies in
    the host's memory. ``recompute_names``: exceptions such as "ffn_up=recompute" (names: :mod:`retro_jax.config.recompute`).
    """

    vocab_size: int | None = None
    vocab_multiple: int = 128
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    positions: Positions = "rotary"
    max_positions: int = 2048
    rotary_fraction: float = 1.0
    rotary_base: float = 10_000.0
    rotary_scale: float = 1.0
    activation: Activation = "gelu"
    linear_bias: bool = True
    qkv_bias: bool | None = None
    tied_embedding: bool = True
    final_norm: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    implementation: Implementation | None = None
    recompute: RecomputePolicy = "none"
    recompute_names: tuple[str, ...] = ()
    retro: RetroConfig | None = field(default_factory=RetroConfig)

    def __post_init__(self) -> None:
        check_positive(
            self, "vocab_multiple", "width", "num_layers", "num_heads", "max_positions", "rotary_scale", "init_std", "norm_eps"
        )
        for name in ("vocab_size", "num_kv_heads", "head_dim", "ffn_dim"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check_choice(self, "norm", get_args(Norm))
        check_choice(self, "positions", get_args(Positions))
        check_choice(self, "activation", get_args(Activation))
        if self.implementation is not None:
            check_choice(self, "implementation", get_args(Implementation))
        check_recompute(self, self.recompute, self.recompute_names)
        check_fraction(self, "dropout", "attention_dropout")
        check(
            0.0 < self.rotary_fraction <= 1.0, f"ModelConfig.rotary_fraction={self.rotary_fraction} must be above 0 and at most 1"
        )
        check(
            self.head_dim is not None or self.width % self.num_heads == 0,
            f"ModelConfig.width={self.width} is not divisible by num_heads={self.num_heads}; set ModelConfig.head_dim explicitly",
        )
        check(
            self.num_heads % self.kv_heads == 0,
            f"ModelConfig.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}",
        )
        if self.retro is not None:
            layers = self.cca_layers
            check(
                len(layers) > 0,
                f"the published rule puts no CCA layer into ModelConfig.num_layers={self.num_layers}; "
                f"set RetroConfig.cca_layers, for example ({self.num_layers},)",
            )
            check(
                layers[-1] <= self.num_layers,
                f"RetroConfig.cca_layers={layers} names a layer above ModelConfig.num_layers={self.num_layers}",
            )

    @property
    def heads_dim(self) -> int:
        """Width of one head (H)."""
        return self.head_dim if self.head_dim is not None else self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads (G)."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def ffn_width(self) -> int:
        """Feed-forward width (F)."""
        return self.ffn_dim if self.ffn_dim is not None else 4 * self.width

    @property
    def cca_layers(self) -> tuple[int, ...]:
        """1-based decoder layers with chunked cross-attention; empty for a GPT (RETRO, section 4; Megatron's rule)."""
        if self.retro is None:
            return ()
        if self.retro.cca_layers is not None:
            return self.retro.cca_layers
        return tuple(range(6 if self.num_layers <= 15 else 9, self.num_layers + 1, 3))
