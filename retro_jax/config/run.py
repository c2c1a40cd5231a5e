"""All settings of a run, and how they must agree."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from retro_jax.config.checks import check
from retro_jax.config.data import ChunkConfig, CorpusConfig, DataConfig, RetrievalConfig, TokenizerConfig
from retro_jax.config.evaluation import QaConfig, TextQualityConfig
from retro_jax.config.generation import GenerateConfig
from retro_jax.config.harness import HarnessConfig
from retro_jax.config.mesh import MeshConfig
from retro_jax.config.model import ModelConfig
from retro_jax.config.training import EvalConfig, OptimizerConfig, TrainConfig


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
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    generation: GenerateConfig = field(default_factory=GenerateConfig)
    qa: QaConfig = field(default_factory=QaConfig)
    text_quality: TextQualityConfig = field(default_factory=TextQualityConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)

    def __post_init__(self) -> None:
        m = self.chunks.chunk_len
        if self.model.retro is not None:
            check(
                self.model.retro.chunks == self.chunks,
                f"Config.chunks={self.chunks} and RetroConfig.chunks={self.model.retro.chunks} differ; "
                "give both the same ChunkConfig",
            )
        check(
            self.corpus.executor == self.retrieval.executor,
            f"CorpusConfig.executor={self.corpus.executor} and RetrievalConfig.executor={self.retrieval.executor} differ; "
            "give both the same ExecutorConfig",
        )
        for name, value in (
            ("DataConfig.seq_len", self.data.seq_len),
            ("EvalConfig.window", self.evaluation.window),
            ("EvalConfig.stride", self.evaluation.stride),
        ):
            nearest = max(1, round(value / m)) * m
            check(value % m == 0, f"{name}={value} is not a multiple of ChunkConfig.chunk_len={m}; use {nearest}")
        sources = range(len(self.corpus.sources))
        check(
            all(number in sources for number in self.data.neighbour_sources or ()),
            f"DataConfig.neighbour_sources={self.data.neighbour_sources} are not all in 0 to {len(sources) - 1}, the numbers of "
            "CorpusConfig.sources",
        )
        check(
            self.chunks.num_neighbours <= self.retrieval.saved,
            f"ChunkConfig.num_neighbours={self.chunks.num_neighbours} is above RetrievalConfig.saved={self.retrieval.saved}; "
            "save at least as many",
        )
        check(
            self.evaluation.overlap_neighbours <= self.retrieval.saved,
            f"EvalConfig.overlap_neighbours={self.evaluation.overlap_neighbours} is above "
            f"RetrievalConfig.saved={self.retrieval.saved}; save at least as many",
        )
        step = self.generation.retrieval_step
        check(
            step is None or step <= m,
            f"GenerateConfig.retrieval_step={step} is above ChunkConfig.chunk_len={m}, the tokens that a chunk's neighbours "
            f"serve; use at most {m}",
        )
        self._check_mesh()
        if self.training.trained == "retrieval":
            check(
                self.model.retro is not None and self.model.retro.gate != 0.0,
                "TrainConfig.trained='retrieval' trains nothing of a model without retrieval; set ModelConfig.retro and a gate, "
                "or trained='all'",
            )
        if self.model.positions == "learned":
            longest = max(self.data.seq_len, self.evaluation.window, self.harness.max_tokens or 0)
            check(
                self.model.max_positions >= longest,
                f"ModelConfig.max_positions={self.model.max_positions} is below the longest row, {longest}; raise it",
            )

    def _check_mesh(self) -> None:
        mesh, m = self.mesh, self.chunks.chunk_len
        parts = mesh.data * mesh.fsdp * self.training.accumulate
        check(
            self.data.batch_size % parts == 0,
            f"DataConfig.batch_size={self.data.batch_size} is not a multiple of MeshConfig.data * fsdp * "
            f"TrainConfig.accumulate = {mesh.data} * {mesh.fsdp} * {self.training.accumulate}; "
            f"use {max(1, round(self.data.batch_size / parts)) * parts}",
        )
        check(
            self.data.seq_len % (m * mesh.sequence) == 0,
            f"DataConfig.seq_len={self.data.seq_len} is not a multiple of ChunkConfig.chunk_len * MeshConfig.sequence = "
            f"{m} * {mesh.sequence}; use {max(1, round(self.data.seq_len / (m * mesh.sequence))) * m * mesh.sequence}",
        )
        check(
            self.data.seq_len // mesh.sequence % mesh.tensor == 0,
            f"DataConfig.seq_len={self.data.seq_len} is not a multiple of MeshConfig.sequence * tensor = "
            f"{mesh.sequence} * {mesh.tensor}; change one of them",
        )
        if self.model.retro is None:
            return
        division, chunks = self.model.retro.encoder.division, self.data.seq_len // (m * mesh.sequence)
        check(
            division != "chunks" or chunks % mesh.tensor == 0,
            f"EncoderConfig.division='chunks' cannot share DataConfig.seq_len / (ChunkConfig.chunk_len * MeshConfig.sequence) = "
            f"{self.data.seq_len} / ({m} * {mesh.sequence}) = {chunks} chunks among MeshConfig.tensor={mesh.tensor} devices; "
            "change one of them",
        )
        packs = self.training.neighbour_capacity != 1.0
        check(
            division != "chunks" or not packs,
            "EncoderConfig.division='chunks' leaves each device the chunks of its own tokens, which "
            f"TrainConfig.neighbour_capacity={self.training.neighbour_capacity} packs together; use division='heads', or 1.0",
        )
        check(
            (division != "heads" and not packs and chunks % mesh.tensor == 0) or self.chunks.retrieved_len % mesh.tensor == 0,
            f"ChunkConfig.retrieved_len={self.chunks.retrieved_len} is not a multiple of MeshConfig.tensor={mesh.tensor}; "
            "change one of them",
        )


def resolved(config: object) -> dict:
    """The config as nested plain values (JSON), every default written out."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]
