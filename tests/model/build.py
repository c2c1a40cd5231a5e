"""Small models with random parameters everywhere, and random rows for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.config import ChunkConfig, EncoderConfig, ModelConfig, RetroConfig
from retro_jax.data.batch import Batch
from retro_jax.model import Retro

C, K, R = 4, 2, 8
CHUNKS = ChunkConfig(chunk_len=C, num_neighbours=K, retrieved_len=R)


def small(*, encoder: dict[str, Any] | None = None, retro: dict[str, Any] | None = None, **model: Any) -> ModelConfig:
    """Two layers of width 16 with CCA in both, one encoder layer; what is given replaces that."""
    encoder_config = EncoderConfig(**{"num_layers": 1} | (encoder or {}))
    retro_config = RetroConfig(**{"chunks": CHUNKS, "cca_layers": (1, 2), "encoder": encoder_config} | (retro or {}))
    default = {"vocab_size": 64, "width": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "max_positions": 16}
    return ModelConfig(**default | {"retro": retro_config} | model)


def gpt(config: ModelConfig) -> ModelConfig:
    """The same model without retrieval."""
    return dataclasses.replace(config, retro=None)


def randomised(config: ModelConfig, seed: int = 0, dtype: Any = jnp.float32) -> Retro:
    """A model in which nothing is trivially 0 or 1: every parameter is 0.3 x normal; norm scales and gates are moved by 1."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Retro(config, key=jax.random.key(0))))
    random = np.random.default_rng(seed)

    def fill(path: Any, leaf: Any) -> jax.Array:
        one = jax.tree_util.keystr(path).count("'scale'") and config.norm != "layernorm1p"
        gate = jax.tree_util.keystr(path).count("'gate'")
        return jnp.asarray(0.3 * random.standard_normal(leaf.shape) + (1.0 if one or gate else 0.0), dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def fresh(config: ModelConfig, seed: int = 0) -> Retro:
    """A model as it starts; built in one compiled function."""
    graph = nnx.split(nnx.eval_shape(lambda: Retro(config, key=jax.random.key(0))))[0]
    return nnx.merge(graph, jax.jit(lambda key: nnx.split(Retro(config, key=key))[1])(jax.random.key(seed)))


def rows(
    seed: int = 0, B: int = 2, T: int = 12, L: int = 3, *, segments: Any = None, first: Any = None, vocab: int = 64
) -> Batch:
    """Random rows; a neighbour of the last chunk is missing and one of the first is short."""
    random = np.random.default_rng(seed)
    segments_BT = np.ones((B, T), np.int32) if segments is None else np.broadcast_to(np.asarray(segments, np.int32), (B, T))
    starts = np.where(np.diff(segments_BT, axis=1, prepend=-1) != 0, np.arange(T)[None], 0)
    positions = (np.arange(T)[None] - np.maximum.accumulate(starts, axis=1)) * (segments_BT > 0)
    mask = np.ones((B, L, K, R), bool)
    mask[:, -1, 1] = False
    mask[:, 0, 0, 5:] = False
    return Batch(
        tokens=random.integers(0, 64, (B, T), np.int32) * (segments_BT > 0),
        targets=random.integers(0, 64, (B, T), np.int32),
        segments=segments_BT,
        positions=positions.astype(np.int32),
        loss_mask=np.ones((B, T), np.float32),
        neighbours=random.integers(0, 64, (B, L, K, R), np.int32) * mask,
        neighbour_mask=mask,
        first_chunk_len=None if first is None else np.asarray(first, np.int32),
    )


def run(model: Retro, batch: Batch, *, retrieval: bool = True, dropout_key: Any = None) -> np.ndarray:
    """Hidden states of a jitted forward pass."""
    graph, state = nnx.split(model)
    return np.asarray(_run(graph, state, batch, dropout_key, retrieval))


@jax.jit(static_argnums=(0, 4))
def _run(graph: Any, state: Any, batch: Batch, dropout_key: Any, retrieval: bool) -> jax.Array:
    return nnx.merge(graph, state)(batch, retrieval=retrieval, dropout_key=dropout_key)
