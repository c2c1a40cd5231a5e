"""The compiled steps of a group of rows: prompts in, some tokens on, and one token on with new neighbours.

Each step ends with a draw, so that what stands in :class:`State` is a token that is known and not yet read: the host can look for
the neighbours of the text that ends with it before it is.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.data.batch import Batch
from retro_jax.generation.cache import Cache
from retro_jax.generation.decode import Arrived, decode
from retro_jax.generation.prefill import logits_of, prefill
from retro_jax.generation.sampling import Sampled, Sampling, draw
from retro_jax.model import Retro


class Params(NamedTuple):
    """A model, ready to be given to a compiled step."""

    graph: nnx.GraphDef
    arrays: nnx.State

    def merged(self) -> Retro:
        """The model."""
        return nnx.merge(self.graph, self.arrays)


class State(NamedTuple):
    """A pytree: the cache, the drawn token that it does not hold yet, the tokens seen (where repetition is penalised), and the
    rows' seeds."""

    cache: Cache
    token_B: jax.Array
    seen_BV: jax.Array | None
    seeds_B: jax.Array


def start(params: Params, batch: Batch, seeds_B: jax.Array, sampling: Sampling, slots: int) -> tuple[State, Sampled]:
    """Read the prompts and draw each row's first token; see :func:`retro_jax.generation.prefill.prefill`."""
    return _start(params.graph, params.arrays, batch, seeds_B, sampling, slots)


def go_on(params: Params, state: State, count: int, sampling: Sampling, most: int) -> tuple[State, Sampled]:
    """Read the drawn token and draw the next, ``count`` times; what was drawn is [B, most], of which ``count`` columns are
    filled. ``state`` is given away. ``count`` may change without compiling anew, ``most`` may not."""
    return _go_on(params.graph, params.arrays, state, jnp.asarray(count, jnp.int32), sampling, most)


def go_on_with(params: Params, state: State, arrived: Arrived, sampling: Sampling) -> tuple[State, Sampled]:
    """Read the drawn token, which is the first to read the neighbours that arrived, and draw the next. ``state`` is given
    away."""
    return _go_on_with(params.graph, params.arrays, state, arrived, sampling)


def next_of_rows(params: Params, batch: Batch, seeds_B: jax.Array, number: int, sampling: Sampling) -> Sampled:
    """Draw each row's next token, new token ``number``, by a forward pass over the whole rows: nothing is kept, as in
    training."""
    return _next_of_rows(params.graph, params.arrays, batch, seeds_B, jnp.asarray(number, jnp.int32), sampling)


def some_rows(state: State, rows_B: jax.Array) -> State:
    """The state of these rows alone."""
    return _some_rows(state, rows_B)


@partial(jax.jit, static_argnums=(0, 4, 5))
def _start(
    graph: nnx.GraphDef, arrays: nnx.State, batch: Batch, seeds_B: jax.Array, sampling: Sampling, slots: int
) -> tuple[State, Sampled]:
    logits_BV, cache = prefill(nnx.merge(graph, arrays), batch, slots)
    seen_BV = _seen(batch, logits_BV.shape[1], sampling)
    sampled = draw(logits_BV, sampling, seen_BV, seeds_B, 0)
    return State(cache, sampled.token_B, _marked(seen_BV, sampled.token_B), seeds_B), sampled


@partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=2)
def _go_on(
    graph: nnx.GraphDef, arrays: nnx.State, state: State, count: jax.Array, sampling: Sampling, most: int
) -> tuple[State, Sampled]:
    model, B = nnx.merge(graph, arrays), state.token_B.shape[0]
    nothing = Sampled(jnp.zeros((B, most), jnp.int32), jnp.zeros((B, most), jnp.float32), jnp.ones((B, most), bool))

    def one(carry: tuple[jax.Array, State, Sampled]) -> tuple[jax.Array, State, Sampled]:
        place, state, drawn = carry
        state, sampled = _one_on(model, state, None, sampling)
        drawn = jax.tree.map(lambda all_BM, one_B: all_BM.at[:, place].set(one_B), drawn, sampled)
        return place + 1, state, drawn

    first = jnp.asarray(0, jnp.int32), state, nothing
    _, state, drawn = jax.lax.while_loop(lambda carry: carry[0] < count, one, first)
    return state, drawn


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _go_on_with(
    graph: nnx.GraphDef, arrays: nnx.State, state: State, arrived: Arrived, sampling: Sampling
) -> tuple[State, Sampled]:
    return _one_on(nnx.merge(graph, arrays), state, arrived, sampling)


@partial(jax.jit, static_argnums=(0, 5))
def _next_of_rows(
    graph: nnx.GraphDef, arrays: nnx.State, batch: Batch, seeds_B: jax.Array, number: jax.Array, sampling: Sampling
) -> Sampled:
    model = nnx.merge(graph, arrays)
    hidden_BTD = model(batch)
    last_B11 = ((batch.segments > 0).sum(axis=1, dtype=jnp.int32) - 1)[:, None, None]
    logits_BV = logits_of(model, jnp.take_along_axis(hidden_BTD, last_B11, axis=1))
    return draw(logits_BV, sampling, _seen(batch, logits_BV.shape[1], sampling), seeds_B, number)


@jax.jit
def _some_rows(state: State, rows_B: jax.Array) -> State:
    return jax.tree.map(lambda a: a[rows_B] if a.ndim else a, state)


def _one_on(model: Retro, state: State, arrived: Arrived | None, sampling: Sampling) -> tuple[State, Sampled]:
    logits_BV, cache = decode(model, state.cache, state.token_B, arrived)
    sampled = draw(logits_BV, sampling, state.seen_BV, state.seeds_B, cache.new)
    return State(cache, sampled.token_B, _marked(state.seen_BV, sampled.token_B), state.seeds_B), sampled


def _seen(batch: Batch, vocab: int, sampling: Sampling) -> jax.Array | None:
    if sampling.repetition_penalty == 1.0:
        return None
    B = batch.tokens.shape[0]
    padded_BT = jnp.where(batch.segments > 0, batch.tokens, vocab)
    return jnp.zeros((B, vocab), bool).at[jnp.arange(B)[:, None], padded_BT].set(True, mode="drop")


def _marked(seen_BV: jax.Array | None, token_B: jax.Array) -> jax.Array | None:
    return None if seen_BV is None else seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
