"""The next token from logits: what may be drawn, and the draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: see :class:`retro_jax.config.GenerateConfig`. ``vocab_size``: ids from there on, which only fill up
    the model's table, are never drawn, nor is ``never``."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    vocab_size: int
    never: int | None


class Sampled(NamedTuple):
    """A token a row: int32 ``token_B``; float32 ``log_probability_B`` under the unchanged distribution; bool ``finite_B``,
    whether all of the row's logits are finite."""

    token_B: jax.Array
    log_probability_B: jax.Array
    finite_B: jax.Array


def draw(
    logits_BV: jax.Array, sampling: Sampling, seen_BV: jax.Array | None, seeds_B: jax.Array, number: jax.Array | int
) -> Sampled:
    """Draw a token a row.

    Args:
        logits_BV: float32.
        sampling: how.
        seen_BV: bool, the tokens of prompt and completion; None where nothing is made of it.
        seeds_B: uint32; with ``number`` they decide the draw, whatever other rows there are.
        number: which new token this is, from 0.
    """
    changed_BV = permitted(logits_BV, sampling)
    if seen_BV is not None:
        changed_BV = penalised(changed_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        token_B = jnp.argmax(changed_BV, axis=-1)
    else:
        changed_BV = changed_BV / sampling.temperature
        least_B1 = least_kept(changed_BV, sampling.top_k, sampling.top_p)
        changed_BV = jnp.where(changed_BV >= least_B1, changed_BV, -jnp.inf)
        token_B = jax.vmap(lambda seed, row_V: jax.random.categorical(_key(seed, number), row_V))(seeds_B, changed_BV)
    token_B = token_B.astype(jnp.int32)
    log_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    log_probability_B = jnp.take_along_axis(log_BV, token_B[:, None], axis=1)[:, 0]
    return Sampled(token_B, log_probability_B, jnp.isfinite(logits_BV).all(axis=1))


def permitted(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """-inf for what is never drawn."""
    id_1V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)[None]
    allowed_1V = id_1V < sampling.vocab_size
    if sampling.never is not None:
        allowed_1V = allowed_1V & (id_1V != sampling.never)
    return jnp.where(allowed_1V, logits_BV, -jnp.inf)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Logits of seen tokens divided by ``penalty`` where positive, multiplied where negative (CTRL, Keskar et al. 2019)."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0.0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def least_kept(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """The smallest logit [B, 1] that may be drawn: of the ``top_k`` largest (0: of all), those before which less than ``top_p``
    of their probability lies (Holtzman et al. 2020). Equal logits are kept or dropped together."""
    V = logits_BV.shape[1]
    k = min(top_k, V) if top_k else V
    if top_p == 1.0:
        return jax.lax.top_k(logits_BV, k)[0][:, -1:] if k < V else jnp.full_like(logits_BV[:, :1], -jnp.inf)
    ordered_BK = jax.lax.top_k(logits_BV, k)[0] if k < V else -jnp.sort(-logits_BV, axis=-1)
    share_BK = jax.nn.softmax(ordered_BK, axis=-1)
    kept_BK = jnp.cumsum(share_BK, axis=-1) - share_BK < top_p
    return jnp.where(kept_BK, ordered_BK, jnp.inf).min(axis=-1, keepdims=True)


def _key(seed: jax.Array, number: jax.Array | int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), number)
