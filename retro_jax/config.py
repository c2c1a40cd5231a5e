"""Every setting of a run: frozen, keyword-only dataclasses that check themselves.

Arrays carry their dims in their names, with these letters throughout the project:

    B batch          T tokens of a row     L chunks of a row    C tokens of a chunk (m in the papers)
    K neighbours     R retrieved length    D width              N query heads
    G key/value heads   H head width       F feed-forward width V vocabulary

No class name occurs twice in the tree under :class:`Config`, so ``Class.field`` names a setting; the one
object that stands in two places, :class:`ChunkConfig`, must be equal in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Norm = Literal["layernorm", "layernorm1p", "rmsnorm"]
Positions = Literal["rotary", "learned", "none"]
Activation = Literal["gelu", "gelu_tanh", "squared_relu", "swiglu"]
Implementation = Literal["reference", "xla"]
Baseline = Literal["gpt", "gpt_matched"]
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value > 0, f"{type(config).__name__}.{name}={value} must be positive")


def _check_fraction(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(0.0 <= value < 1.0, f"{type(config).__name__}.{name}={value} must be at least 0 and below 1")


def _check_choice(config: object, name: str, choices: Sequence[str]) -> None:
    value = getattr(config, name)
    _check(value in choices, f"{type(config).__name__}.{name}={value!r} is not known; choose one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the documents come from and how they are split.

    ``sources`` are ``python-docs``, files (``.txt``, ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst``, ``.parquet``), folders
    and globs of them, ``tfds:<dataset>[/config][:split]``, or Megatron token stores ``megatron:<prefix>``.
    ``weights`` gives each source's share of training rows; None: in proportion to their size, each document once an epoch.
    """

    sources: tuple[str, ...] = ("python-docs",)
    weights: tuple[float, ...] | None = None
    text_field: str = "text"
    # Documents are split by a hash of their text ("text": exact duplicates fall on one side) or of the group that the
    # source names ("group": a module of python-docs, a file of a folder).
    split_by: Literal["text", "group"] = "text"
    valid_fraction: float = 0.02
    test_fraction: float = 0.05
    # At most so many documents of each source, from its beginning.
    max_documents: int | None = None
    workers: int = 2
    block_documents: int = 2048

    def __post_init__(self) -> None:
        _check(len(self.sources) > 0, "CorpusConfig.sources is empty; name at least one, for example ('python-docs',)")
        _check_choice(self, "split_by", ("text", "group"))
        _check_fraction(self, "valid_fraction", "test_fraction")
        _check(
            self.valid_fraction + self.test_fraction < 1.0,
            f"CorpusConfig.valid_fraction={self.valid_fraction} and test_fraction={self.test_fraction} leave nothing to train on",
        )
        _check_positive(self, "workers", "block_documents")
        if self.weights is not None:
            _check(
                len(self.weights) == len(self.sources),
                f"CorpusConfig.weights has {len(self.weights)} entries for {len(self.sources)} sources; give one a source",
            )
            _check(all(w > 0 for w in self.weights), f"CorpusConfig.weights={self.weights} must all be positive")
        if self.max_documents is not None:
            _check_positive(self, "max_documents")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes token ids.

    ``train_bpe`` trains a byte-level BPE of ``vocab_size`` on at most ``train_bytes`` of training documents; the others load
    ``path`` (a ``tokenizer.json``, a sentencepiece ``.model``, or GPT-2's ``vocab.json`` with ``merges`` beside it).
    ``bos``/``eod`` name the special tokens of a loaded tokenizer where it does not tell them itself; ``bos=""`` means none.
    """

    kind: Literal["train_bpe", "tokenizer_json", "sentencepiece", "gpt2"] = "train_bpe"
    path: str | None = None
    merges: str | None = None
    vocab_size: int = 8192
    train_bytes: int = 100_000_000
    bos: str | None = None
    eod: str | None = None

    def __post_init__(self) -> None:
        _check_choice(self, "kind", ("train_bpe", "tokenizer_json", "sentencepiece", "gpt2"))
        _check_positive(self, "vocab_size", "train_bytes")
        if self.kind == "train_bpe":
            _check(self.vocab_size >= 320, f"TokenizerConfig.vocab_size={self.vocab_size} is below 320 (256 bytes and merges)")
            _check(self.path is None, "TokenizerConfig.path is given, but kind='train_bpe' trains one; set kind to load it")
        else:
            _check(self.path is not None, f"TokenizerConfig.kind={self.kind!r} loads a file; set TokenizerConfig.path")


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """The grid that training, database and queries share: ``chunk_len`` tokens a chunk (m), ``num_neighbours`` a chunk (k),
    ``retrieved_len`` tokens a neighbour (r: the chunk and its continuation)."""

    chunk_len: int = 64
    num_neighbours: int = 2
    retrieved_len: int = 128

    def __post_init__(self) -> None:
        _check_positive(self, "chunk_len", "num_neighbours", "retrieved_len")
        _check(
            self.retrieved_len % self.chunk_len == 0,
            f"ChunkConfig.retrieved_len={self.retrieved_len} is not a multiple of chunk_len={self.chunk_len}; "
            f"use {max(1, self.retrieved_len // self.chunk_len) * self.chunk_len}",
        )


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How neighbours are found: an embedder, an index, and how many are kept.

    ``tfidf``: hashed 1-to-``max_ngram``-gram TF-IDF of ``features`` columns, searched exactly. ``lsa``: its projection on
    ``lsa_dim`` dimensions, learned from ``lsa_train_chunks`` random training chunks and searched by faiss with
    ``index_factory`` (any faiss factory string; "auto" chooses by size), trained on ``index_train_chunks`` random ones.
    ``index_search``: faiss search parameters such as "nprobe=64" or "efSearch=128"; "auto" chooses by the index.
    """

    embedder: Literal["tfidf", "lsa"] = "tfidf"
    features: int = 2**20
    max_ngram: int = 2
    lsa_dim: int = 256
    lsa_train_chunks: int = 100_000
    index_factory: str = "auto"
    index_search: str = "auto"
    index_train_chunks: int = 1_000_000
    saved: int = 20
    block_chunks: int = 4096
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice(self, "embedder", ("tfidf", "lsa"))
        _check_positive(
            self, "features", "max_ngram", "lsa_dim", "lsa_train_chunks", "index_train_chunks", "saved", "block_chunks", "workers"
        )
        _check(self.features < 2**31, f"RetrievalConfig.features={self.features} must be below 2**31")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training rows: ``seq_len`` tokens (T), ``batch_size`` rows a step over all hosts; and which of the neighbours found are
    read, in training and evaluation alike. ``max_overlap`` drops those that share more than this fraction of the chunk's tokens
    (longest common run) with the chunk or its continuation; ``neighbour_sources`` keeps those from these of
    ``CorpusConfig.sources``, by number from 0. None keeps all."""

    seq_len: int = 512
    batch_size: int = 8
    seed: int = 0
    workers: int = 0
    prefetch: int = 4
    max_overlap: float | None = None
    neighbour_sources: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "seq_len", "batch_size", "prefetch")
        for name in ("workers", "seed"):
            _check(getattr(self, name) >= 0, f"DataConfig.{name}={getattr(self, name)} must not be negative")
        if self.max_overlap is not None:
            _check(0.0 < self.max_overlap <= 1.0, f"DataConfig.max_overlap={self.max_overlap} must be above 0 and at most 1")
        if self.neighbour_sources is not None:
            _check(len(self.neighbour_sources) > 0, "DataConfig.neighbour_sources is empty; name at least one, or set it None")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The neighbour encoder: bidirectional layers, the first conditioned on the decoder's states of the chunk that asks.

    ``width``/``num_heads``/``ffn_dim`` None: as the decoder. ``embedding``: the decoder's table, or its own.
    ``conditioning``: "decoder" states at the first CCA layer, or "none". ``cross_residual``: "stream" adds the encoder's
    cross-attention to the un-normed stream (RETRO, Megatron legacy), "normed" to the normed one (Megatron core).
    ``padding``: "masked" hides padding from attention; "attended" is Megatron's behaviour.
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

    def __post_init__(self) -> None:
        _check(self.num_layers >= 0, f"EncoderConfig.num_layers={self.num_layers} must not be negative")
        for name in ("width", "num_heads", "ffn_dim"):
            if getattr(self, name) is not None:
                _check_positive(self, name)
        _check_choice(self, "embedding", ("shared", "own"))
        _check_choice(self, "positions", get_args(Positions))
        _check_choice(self, "conditioning", ("decoder", "none"))
        _check_choice(self, "cross_residual", ("stream", "normed"))
        _check_choice(self, "padding", ("masked", "attended"))
        _check_fraction(self, "dropout", "attention_dropout")
        _check(
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
        _check_choice(self, "cca_positions", ("rotary", "none"))
        _check_choice(self, "cca_init", ("standard", "copy"))
        _check_positive(self, "conv_width", "copy_strength")
        _check_fraction(self, "neighbour_dropout")
        _check(
            not isinstance(self.gate, str) or self.gate == "learned",
            f"RetroConfig.gate={self.gate!r} is neither a number nor 'learned'",
        )
        if self.cca_layers is not None:
            _check(len(self.cca_layers) > 0, "RetroConfig.cca_layers is empty; for a plain GPT set ModelConfig.retro = None")
            _check(
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
    retro: RetroConfig | None = field(default_factory=RetroConfig)

    def __post_init__(self) -> None:
        _check_positive(
            self, "vocab_multiple", "width", "num_layers", "num_heads", "max_positions", "rotary_scale", "init_std", "norm_eps"
        )
        for name in ("vocab_size", "num_kv_heads", "head_dim", "ffn_dim"):
            if getattr(self, name) is not None:
                _check_positive(self, name)
        _check_choice(self, "norm", get_args(Norm))
        _check_choice(self, "positions", get_args(Positions))
        _check_choice(self, "activation", get_args(Activation))
        if self.implementation is not None:
            _check_choice(self, "implementation", get_args(Implementation))
        _check_fraction(self, "dropout", "attention_dropout")
        _check(
            0.0 < self.rotary_fraction <= 1.0, f"ModelConfig.rotary_fraction={self.rotary_fraction} must be above 0 and at most 1"
        )
        _check(
            self.head_dim is not None or self.width % self.num_heads == 0,
            f"ModelConfig.width={self.width} is not divisible by num_heads={self.num_heads}; set ModelConfig.head_dim explicitly",
        )
        _check(
            self.num_heads % self.kv_heads == 0,
            f"ModelConfig.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}",
        )
        if self.retro is not None:
            layers = self.cca_layers
            _check(
                len(layers) > 0,
                f"the published rule puts no CCA layer into ModelConfig.num_layers={self.num_layers}; "
                f"set RetroConfig.cca_layers, for example ({self.num_layers},)",
            )
            _check(
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


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, warm-up, and a cosine or constant schedule. ``decay_mask``: which parameters
    decay ("matrices": all but biases and 1-D weights, as Megatron; "all"). ``clip_norm`` 0 turns clipping off."""

    learning_rate: float = 3e-4
    min_learning_rate: float = 3e-5
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_mask: Literal["matrices", "all"] = "matrices"
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "learning_rate", "eps")
        _check_choice(self, "schedule", ("cosine", "constant"))
        _check_choice(self, "decay_mask", ("matrices", "all"))
        _check_fraction(self, "beta1", "beta2")
        for name in ("min_learning_rate", "warmup_steps", "weight_decay", "clip_norm"):
            _check(getattr(self, name) >= 0, f"OptimizerConfig.{name}={getattr(self, name)} must not be negative")
        _check(
            self.min_learning_rate <= self.learning_rate,
            f"OptimizerConfig.min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and with what care to train. ``baselines`` are trained after the model on identical rows: "gpt" is the model
    without retrieval, "gpt_matched" the same with a wider feed-forward until it has as many parameters as the Retro.
    ``precision`` "auto": bfloat16 compute on accelerators, float32 on CPU; master weights are float32.
    ``loss_chunk`` tokens' logits exist at a time. ``keep`` latest checkpoints are kept, and the best by validation loss."""

    steps: int = 1000
    baselines: tuple[Baseline, ...] = ()
    accumulate: int = 1
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    loss_chunk: int = 2048
    log_every: int = 10
    checkpoint_every: int = 200
    keep: int = 2
    valid_every: int = 200
    valid_batches: int = 8

    def __post_init__(self) -> None:
        _check_positive(self, "steps", "accumulate", "loss_chunk", "log_every", "checkpoint_every", "keep")
        _check_choice(self, "precision", ("auto", "float32", "bfloat16"))
        for baseline in self.baselines:
            _check(
                baseline in get_args(Baseline),
                f"TrainConfig.baselines names {baseline!r}; choose from {', '.join(get_args(Baseline))}",
            )
        for name in ("valid_every", "valid_batches"):
            _check(getattr(self, name) >= 0, f"TrainConfig.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on whole held-out documents: windows of ``window`` tokens, moved by ``stride``; every token is scored once,
    with the context of the window in which it is first seen. Both are multiples of the chunk length."""

    split: Literal["valid", "test"] = "test"
    window: int = 512
    stride: int = 256
    batch_size: int = 8
    max_documents: int | None = None
    overlap_neighbours: int = 10
    bootstrap_samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice(self, "split", ("valid", "test"))
        _check_positive(self, "window", "stride", "batch_size", "overlap_neighbours", "bootstrap_samples")
        _check(self.seed >= 0, f"EvalConfig.seed={self.seed} must not be negative")
        _check(
            self.stride <= self.window, f"EvalConfig.stride={self.stride} is above window={self.window}: tokens would be left out"
        )
        if self.max_documents is not None:
            _check_positive(self, "max_documents")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. ``data_dir`` holds the data artefacts; None: ``<workdir>/data``."""

    data_dir: str | None = None
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    chunks: ChunkConfig = field(default_factory=ChunkConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        m = self.chunks.chunk_len
        if self.model.retro is not None:
            _check(
                self.model.retro.chunks == self.chunks,
                f"Config.chunks={self.chunks} and RetroConfig.chunks={self.model.retro.chunks} differ; "
                "give both the same ChunkConfig",
            )
        for name, value in (
            ("DataConfig.seq_len", self.data.seq_len),
            ("EvalConfig.window", self.evaluation.window),
            ("EvalConfig.stride", self.evaluation.stride),
        ):
            nearest = max(1, round(value / m)) * m
            _check(value % m == 0, f"{name}={value} is not a multiple of ChunkConfig.chunk_len={m}; use {nearest}")
        sources = range(len(self.corpus.sources))
        _check(
            all(number in sources for number in self.data.neighbour_sources or ()),
            f"DataConfig.neighbour_sources={self.data.neighbour_sources} are not all in 0 to {len(sources) - 1}, the numbers of "
            "CorpusConfig.sources",
        )
        _check(
            self.chunks.num_neighbours <= self.retrieval.saved,
            f"ChunkConfig.num_neighbours={self.chunks.num_neighbours} is above RetrievalConfig.saved={self.retrieval.saved}; "
            "save at least as many",
        )
        _check(
            self.evaluation.overlap_neighbours <= self.retrieval.saved,
            f"EvalConfig.overlap_neighbours={self.evaluation.overlap_neighbours} is above "
            f"RetrievalConfig.saved={self.retrieval.saved}; save at least as many",
        )
        _check(
            self.data.batch_size % self.training.accumulate == 0,
            f"DataConfig.batch_size={self.data.batch_size} is not a multiple of "
            f"TrainConfig.accumulate={self.training.accumulate}; change one of them",
        )
        if self.model.positions == "learned":
            longest = max(self.data.seq_len, self.evaluation.window)
            _check(
                self.model.max_positions >= longest,
                f"ModelConfig.max_positions={self.model.max_positions} is below the longest row, {longest}; raise it",
            )


def resolved(config: object) -> dict:
    """The config as nested plain values (JSON), every default written out."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]
