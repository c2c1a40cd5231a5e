"""Every setting of a run: frozen, keyword-only dataclasses that check themselves.

Arrays carry their dims in their names, with these letters throughout the project:

    B batch          T tokens of a row     L chunks of a row    C tokens of a chunk (m in the papers)
    K neighbours     R retrieved length    D width              N query heads
    G key/value heads   H head width       F feed-forward width V vocabulary

No class name occurs twice in the tree under :class:`Config`, so ``Class.field`` names a setting; the objects that
stand in two places, :class:`ChunkConfig` and :class:`ExecutorConfig`, must be equal in both.
"""

from retro_jax.config.data import (
    SPLITS,
    BertConfig,
    ChunkConfig,
    Context,
    CorpusConfig,
    DataConfig,
    Metric,
    RetrievalConfig,
    Split,
    TokenizerConfig,
)
from retro_jax.config.evaluation import QaConfig, QaMode, TextQualityConfig
from retro_jax.config.executor import ExecutorConfig
from retro_jax.config.generation import GenerateConfig, GridMode, RetrievalMode
from retro_jax.config.harness import HarnessConfig
from retro_jax.config.mesh import MeshConfig
from retro_jax.config.model import Activation, EncoderConfig, Implementation, ModelConfig, Norm, Positions, RetroConfig
from retro_jax.config.recompute import Part, Recompute, RecomputePolicy
from retro_jax.config.run import Config, resolved
from retro_jax.config.training import Baseline, EvalConfig, OptimizerConfig, TrainConfig, Trained

__all__ = [
    "SPLITS",
    "Activation",
    "Baseline",
    "BertConfig",
    "ChunkConfig",
    "Config",
    "Context",
    "CorpusConfig",
    "DataConfig",
    "EncoderConfig",
    "EvalConfig",
    "ExecutorConfig",
    "GenerateConfig",
    "GridMode",
    "HarnessConfig",
    "Implementation",
    "MeshConfig",
    "Metric",
    "ModelConfig",
    "Norm",
    "OptimizerConfig",
    "Part",
    "Positions",
    "QaConfig",
    "QaMode",
    "Recompute",
    "RecomputePolicy",
    "RetrievalConfig",
    "RetrievalMode",
    "RetroConfig",
    "Split",
    "TextQualityConfig",
    "TokenizerConfig",
    "TrainConfig",
    "Trained",
    "resolved",
]
