"""Settings of the data: documents, tokens, chunks, their neighbours, and rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from retro_jax.config.checks import check, check_choice, check_fraction, check_positive
from retro_jax.config.executor import ExecutorConfig

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Metric = Literal["cosine", "inner_product", "l2"]
Context = Literal["none", "title", "before", "title_and_before"]


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
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)

    def __post_init__(self) -> None:
        check(len(self.sources) > 0, "CorpusConfig.sources is empty; name at least one, for example ('python-docs',)")
        check_choice(self, "split_by", ("text", "group"))
        check_fraction(self, "valid_fraction", "test_fraction")
        check(
            self.valid_fraction + self.test_fraction < 1.0,
            f"CorpusConfig.valid_fraction={self.valid_fraction} and test_fraction={self.test_fraction} leave nothing to train on",
        )
        check_positive(self, "workers", "block_documents")
        if self.weights is not None:
            check(
                len(self.weights) == len(self.sources),
                f"CorpusConfig.weights has {len(self.weights)} entries for {len(self.sources)} sources; give one a source",
            )
            check(all(w > 0 for w in self.weights), f"CorpusConfig.weights={self.weights} must all be positive")
        if self.max_documents is not None:
            check_positive(self, "max_documents")


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
        check_choice(self, "kind", ("train_bpe", "tokenizer_json", "sentencepiece", "gpt2"))
        check_positive(self, "vocab_size", "train_bytes")
        if self.kind == "train_bpe":
            check(self.vocab_size >= 320, f"TokenizerConfig.vocab_size={self.vocab_size} is below 320 (256 bytes and merges)")
            check(self.path is None, "TokenizerConfig.path is given, but kind='train_bpe' trains one; set kind to load it")
        else:
            check(self.path is not None, f"TokenizerConfig.kind={self.kind!r} loads a file; set TokenizerConfig.path")


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """The grid that training, database and queries share: ``chunk_len`` tokens a chunk (m), ``num_neighbours`` a chunk (k),
    ``retrieved_len`` tokens a neighbour (r: the chunk and its continuation)."""

    chunk_len: int = 64
    num_neighbours: int = 2
    retrieved_len: int = 128

    def __post_init__(self) -> None:
        check_positive(self, "chunk_len", "num_neighbours", "retrieved_len")
        check(
            self.retrieved_len % self.chunk_len == 0,
            f"ChunkConfig.retrieved_len={self.retrieved_len} is not a multiple of chunk_len={self.chunk_len}; "
            f"use {max(1, self.retrieved_len // self.chunk_len) * self.chunk_len}",
        )


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """A sentence encoder of BERT's form, for ``RetrievalConfig.embedder="bert"``.

    ``path``: a local folder in Hugging Face's format. ``pooling``: the mean of a text's tokens ("mean"), of those that are not
    special ("mean_without_special"), or the first one ("cls"); "auto": what the folder says (``1_Pooling/config.json``), "mean"
    where it says nothing. ``normalize``: whether vectors are made to have length 1; "auto": as the folder says (``modules.json``
    has a Normalize or not), "yes" where it says nothing. ``max_length``: tokens of a text that are read, special ones included;
    None: what the folder says (``sentence_bert_config.json``), else all that the model has positions for. ``prefix`` stands
    before every text of the database (E5: "passage: ").

    What searches, a chunk or a question, is embedded by the same model with the same prefix, unless ``query_path`` names a
    second model (DRAGON+) or ``query_prefix`` another prefix (E5: "query: "); training chunks are then embedded twice.
    """

    path: str | None = None
    query_path: str | None = None
    pooling: Literal["auto", "mean", "mean_without_special", "cls"] = "auto"
    normalize: Literal["auto", "yes", "no"] = "auto"
    max_length: int | None = None
    prefix: str = ""
    query_prefix: str | None = None
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_choice(self, "pooling", ("auto", "mean", "mean_without_special", "cls"))
        check_choice(self, "normalize", ("auto", "yes", "no"))
        check_choice(self, "precision", ("float32", "bfloat16"))
        check(
            self.query_path is None or self.path is not None,
            f"BertConfig.query_path={self.query_path!r} embeds what searches; set BertConfig.path to what embeds the database",
        )
        if self.max_length is not None:
            check(
                self.max_length >= 3, f"BertConfig.max_length={self.max_length} must be at least 3, for [CLS], a token and [SEP]"
            )


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How neighbours are found: an embedder, an index, and how many are kept.

    ``tfidf``: hashed 1-to-``max_ngram``-gram TF-IDF of ``features`` columns, searched exactly. ``lsa``: its projection on
    ``lsa_dim`` dimensions, learned from ``lsa_train_chunks`` random training chunks. ``bert``: a sentence encoder of BERT's form.
    Dense vectors (``lsa``, ``bert``) are compared by ``metric``: "cosine" (of vectors of unit length), or "inner_product" or "l2"
    (of the vectors as they are). faiss searches them with ``index_factory`` (any faiss factory string; "auto" chooses by size),
    trained on ``index_train_chunks`` random chunks, with ``index_search``: faiss search parameters such as "nprobe=64" or
    "efSearch=128"; "auto" raises them until the recall measured is 0.95. ``index_factory="exact"`` compares with every chunk, in
    JAX on all of its devices.

    ``context``: what a chunk of the database is embedded with: the title of its document, the chunk before it, both in front of
    it, or nothing (as in the papers). What searches, a chunk or a question, is embedded alone; with a context training chunks
    are therefore embedded twice.
    """

    embedder: Literal["tfidf", "lsa", "bert"] = "tfidf"
    features: int = 2**20
    max_ngram: int = 2
    lsa_dim: int = 256
    lsa_train_chunks: int = 100_000
    bert: BertConfig = field(default_factory=BertConfig)
    metric: Metric = "cosine"
    context: Context = "none"
    index_factory: str = "auto"
    index_search: str = "auto"
    index_train_chunks: int = 1_000_000
    saved: int = 20
    block_chunks: int = 4096
    workers: int = 2
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "embedder", ("tfidf", "lsa", "bert"))
        check_choice(self, "metric", get_args(Metric))
        check(
            self.embedder != "tfidf" or self.metric == "cosine",
            f"RetrievalConfig.metric={self.metric!r} is for dense vectors; embedder='tfidf' is searched by cosine: "
            "use metric='cosine', or embedder='lsa' or 'bert'",
        )
        check(
            self.index_factory != "exact" or self.index_search == "auto",
            f"RetrievalConfig.index_search={self.index_search!r} sets parameters of faiss, which index_factory='exact' does not "
            "use; use index_search='auto'",
        )
        check_choice(self, "context", get_args(Context))
        check_positive(
            self, "features", "max_ngram", "lsa_dim", "lsa_train_chunks", "index_train_chunks", "saved", "block_chunks", "workers"
        )
        check(self.features < 2**31, f"RetrievalConfig.features={self.features} must be below 2**31")
        check(
            self.embedder != "bert" or self.bert.path is not None,
            "RetrievalConfig.embedder='bert' loads a model; set BertConfig.path to a folder in Hugging Face's format",
        )

    @property
    def symmetric(self) -> bool:
        """Whether a chunk is embedded alike to be found and to search, and so once."""
        two_sided = self.embedder == "bert" and (self.bert.query_path is not None or self.bert.query_prefix is not None)
        return self.context == "none" and not two_sided


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training rows: ``seq_len`` tokens (T), ``batch_size`` rows a step over all hosts; and which of the neighbours found are
    read, in training and evaluation alike. ``max_overlap`` drops those that share more than this fraction of the chunk's tokens
    (longest common run) with the chunk or its continuation; ``neighbour_sources`` keeps those from these of
    ``CorpusConfig.sources``, by number from 0. None keeps all.

    ``rows``: training looks up rows and their neighbours in the chunk table ("gathered"), or reads both from one sequential file
    in the order of training, for network file systems ("joined"; ``python -m retro_jax prepare --join`` writes it). The batches
    are the same bit for bit."""

    seq_len: int = 512
    batch_size: int = 8
    seed: int = 0
    rows: Literal["gathered", "joined"] = "gathered"
    workers: int = 0
    prefetch: int = 4
    max_overlap: float | None = None
    neighbour_sources: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_positive(self, "seq_len", "batch_size", "prefetch")
        check_choice(self, "rows", ("gathered", "joined"))
        for name in ("workers", "seed"):
            check(getattr(self, name) >= 0, f"DataConfig.{name}={getattr(self, name)} must not be negative")
        if self.max_overlap is not None:
            check(0.0 < self.max_overlap <= 1.0, f"DataConfig.max_overlap={self.max_overlap} must be above 0 and at most 1")
        if self.neighbour_sources is not None:
            check(len(self.neighbour_sources) > 0, "DataConfig.neighbour_sources is empty; name at least one, or set it None")
