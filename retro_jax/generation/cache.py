"""What decoding keeps of the tokens before: keys and values, the neighbours that are read now, and what the next ones need."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retro_jax.kernels.attention import KeyMask


class LayerCache(NamedTuple):
    """Of one decoder layer; S slots a row, of which the first are the prompt's and the others the new tokens', head-major as
    attention reads them. The last three are of layers with CCA, where neighbours are read: keys and values of X = K * R neighbour
    tokens, and the normed states of the last U tokens, for queries that mix them."""

    keys_BGSH: jax.Array
    values_BGSH: jax.Array
    neighbour_keys_BXGH: jax.Array | None = None
    neighbour_values_BXGH: jax.Array | None = None
    before_BUD: jax.Array | None = None


class Reading(NamedTuple):
    """Which neighbours the rows read now: their valid tokens, whether a row reads at all, the tokens since they came (all rows
    get new ones together), and the normed states of the last C tokens at the first CCA layer, which condition the next ones."""

    mask_BX: jax.Array
    reads_B: jax.Array
    since: jax.Array
    states_BCD: jax.Array


class Cache(NamedTuple):
    """A pytree. Rows are in step: each has ``new`` new tokens, and new token i stands in slot ``prompt_slots`` + i of all of
    them, so that one is written by one slice, whatever the prompts' lengths."""

    layers: tuple[LayerCache, ...]
    reading: Reading | None
    lengths_B: jax.Array
    """int32: tokens of each prompt."""
    prompt_slots: jax.Array
    new: jax.Array

    def next_token_sees(self) -> KeyMask:
        """The slots that the token to come sees, its own among them."""
        slot_1S = jnp.arange(self.layers[0].keys_BGSH.shape[2], dtype=jnp.int32)[None]
        new_1S = (slot_1S >= self.prompt_slots) & (slot_1S <= self.prompt_slots + self.new)
        return KeyMask((slot_1S < self.lengths_B[:, None]) | new_1S)


def store(slots_BGSH: jax.Array, x_B1GH: jax.Array, slot: jax.Array) -> jax.Array:
    """The slots with one token's keys or values written into one of them."""
    return jax.lax.dynamic_update_slice_in_dim(slots_BGSH, x_B1GH.swapaxes(1, 2), slot, axis=2)


def with_slots(x_BTGH: jax.Array, slots: int) -> jax.Array:
    """Keys or values of the prompts, with empty slots after them: [B, G, S, H]."""
    T = x_BTGH.shape[1]
    return jnp.pad(x_BTGH.swapaxes(1, 2), ((0, 0), (0, 0), (0, slots - T), (0, 0)))


def last_of(x_BTD: jax.Array, lengths_B: jax.Array, count: int) -> jax.Array:
    """Each row's ``count`` tokens before its end, [B, count, D]; zeros before its start."""
    at_BN = lengths_B[:, None] - count + jnp.arange(count, dtype=jnp.int32)[None]
    rows_BND = jnp.take_along_axis(x_BTD, jnp.maximum(at_BN, 0)[:, :, None], axis=1)
    return jnp.where((at_BN >= 0)[:, :, None], rows_BND, jnp.zeros_like(rows_BND))


def moved_on(kept_BND: jax.Array, x_B1D: jax.Array) -> jax.Array:
    """The last N states after one more token."""
    return jnp.concatenate([kept_BND[:, 1:], x_B1D], axis=1) if kept_BND.shape[1] else kept_BND
