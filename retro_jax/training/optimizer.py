"""AdamW, its schedule, and which parameters it may touch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from retro_jax.config import ModelConfig, OptimizerConfig, Trained
from retro_jax.training.state import ParameterFacts, Path

RETRIEVAL_PARTS = frozenset({"cca", "norm_cca", "encoder"})


def make_optimizer(
    config: OptimizerConfig, steps: int, facts: Mapping[Path, ParameterFacts]
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, Adam moments, decoupled weight decay, learning rate; in this order (AdamW, Loshchilov & Hutter).

    A step is p <- p - rate * (m^ / (sqrt(v^) + eps) + weight_decay * p), the decay only where :func:`decays` says so.

    Args:
        config: its settings.
        steps: length of the run, which the cosine schedule ends at.
        facts: of every parameter that is trained.
    """
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    parts.append(optax.scale_by_adam(config.beta1, config.beta2, config.eps))
    if config.weight_decay > 0:
        mask = {path: decays(path, fact, config) for path, fact in facts.items()}
        parts.append(optax.add_decayed_weights(config.weight_decay, lambda params: tree_by_path(params, mask)))
    parts.append(optax.scale_by_learning_rate(learning_rate(config, steps)))
    return optax.chain(*parts)


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """The learning rate by number of finished steps, as a float32 scalar.

    It rises linearly to ``learning_rate`` at step ``warmup_steps``, then stays there or falls on half a cosine to
    ``min_learning_rate``, which step ``steps``, the last, takes.
    """
    top, bottom, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps

    def rate(finished: jax.typing.ArrayLike) -> jax.Array:
        number = jnp.asarray(finished, jnp.float32) + 1.0
        after = top * jnp.ones_like(number)
        if config.schedule == "cosine":
            share = jnp.clip((number - warmup) / max(1, steps - warmup), 0.0, 1.0)
            after = bottom + (top - bottom) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))
        return jnp.where(number < warmup, top * number / max(1, warmup), after)

    return rate


def decays(path: Path, fact: ParameterFacts, config: OptimizerConfig) -> bool:
    """Whether a parameter decays. "matrices" is Megatron's rule, all but biases and 1-D weights; the dims of one layer count,
    not those of the stack that it is scanned in."""
    return config.decay_mask == "all" or (path[-1] != "bias" and len(fact.dims) >= 2)


def is_trained(config: ModelConfig, trained: Trained = "all") -> Callable[[Path], bool]:
    """Which parameters the optimizer holds: all that are to be trained and can get a gradient. With gate 0 nothing of the
    retrieval path is computed, so its parameters have neither decay nor moments."""
    if trained == "retrieval":
        return is_retrieval
    if config.retro is not None and config.retro.gate == 0.0:
        return lambda path: not is_retrieval(path)
    return lambda path: True


def is_retrieval(path: Path) -> bool:
    """Whether a parameter belongs to chunked cross-attention or the encoder, which a GPT does not have."""
    return not RETRIEVAL_PARTS.isdisjoint(path)


def tree_by_path(tree: Any, values: Mapping[Path, Any]) -> Any:
    """``tree`` (nested dicts) with each leaf replaced by the value of its path."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: values[tuple(key.key for key in keys)], tree)
