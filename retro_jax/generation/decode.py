"""One token a row through the layers, reading the cache; with new neighbours where a chunk has filled."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retro_jax.data.batch import Batch
from retro_jax.generation.cache import Cache, LayerCache, Reading, moved_on, store
from retro_jax.generation.prefill import next_logits
from retro_jax.model import Retro
from retro_jax.model.cca import Neighbours
from retro_jax.model.decoder import DecoderLayer


class Arrived(NamedTuple):
    """The neighbours of the text that ends with the token which is decoded: int32 tokens and bool mask of one chunk a row."""

    tokens_BKR: jax.Array
    mask_BKR: jax.Array


def decode(model: Retro, cache: Cache, token_B: jax.Array, arrived: Arrived | None = None) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after one more token a row, and the cache with it.

    With ``arrived``, this token is the first to read these neighbours, encoded here once for it and those that follow
    (conditioned on the last C tokens, or as many as there are). Keys and values of earlier tokens are left as they are.
    """
    positions_B1 = (cache.lengths_B + cache.new)[:, None]
    mask, slot = cache.next_token_sees(), cache.prompt_slots + cache.new
    x_B1D = model.embed(token_B[:, None], positions_B1)
    reading, encoded = cache.reading, None
    layers = []
    for layer, kept in zip(model.layers(), cache.layers, strict=True):
        q, k_B1GH, v_B1GH = layer.attention.project(layer.norm_attention(x_B1D), positions_B1)
        keys, values = store(kept.keys_BGSH, k_B1GH, slot), store(kept.values_BGSH, v_B1GH, slot)
        x_B1D = x_B1D + layer.attention.read(q, keys.swapaxes(1, 2), values.swapaxes(1, 2), mask)
        kept = kept._replace(keys_BGSH=keys, values_BGSH=values)
        if kept.before_BUD is not None:
            assert layer.norm_cca is not None and reading is not None
            normed_B1D = layer.norm_cca(x_B1D)
            if reading is cache.reading:  # the first CCA layer
                reading, encoded = _read_on(model, reading, normed_B1D, arrived, cache.lengths_B + cache.new + 1)
            read_B1D, kept = _cca(layer, kept, normed_B1D, reading, encoded)
            x_B1D = x_B1D + read_B1D
        x_B1D = layer.finish(x_B1D, None, [None, None])
        layers.append(kept)
    return next_logits(model, x_B1D), cache._replace(layers=tuple(layers), reading=reading, new=cache.new + 1)


def _read_on(
    model: Retro, reading: Reading, normed_B1D: jax.Array, arrived: Arrived | None, lengths_B: jax.Array
) -> tuple[Reading, Neighbours | None]:
    """What is read from this token on, and the new neighbours, encoded."""
    states_BCD = moved_on(reading.states_BCD, normed_B1D)
    if arrived is None:
        return reading._replace(since=reading.since + 1, states_BCD=states_BCD), None
    encoded = model.encode_chunks(states_BCD, _one_chunk(states_BCD, arrived, lengths_B), _numbers(lengths_B))
    mask_BX = encoded.mask_BLKR[:, 0].reshape(len(states_BCD), -1)
    return Reading(mask_BX, encoded.reads_BT[:, -1], jnp.zeros_like(reading.since), states_BCD), encoded


def _cca(
    layer: DecoderLayer, kept: LayerCache, normed_B1D: jax.Array, reading: Reading, encoded: Neighbours | None
) -> tuple[jax.Array, LayerCache]:
    cca = layer.cca
    assert cca is not None and kept.before_BUD is not None
    keys, values = kept.neighbour_keys_BXGH, kept.neighbour_values_BXGH
    if encoded is not None:
        keys, values = cca.keep(encoded.encoded_BLKRD[:, 0])
    assert keys is not None and values is not None
    read = cca.read_kept(normed_B1D, kept.before_BUD, keys, values, reading.mask_BX, reading.reads_B, reading.since)
    return read, kept._replace(
        neighbour_keys_BXGH=keys, neighbour_values_BXGH=values, before_BUD=moved_on(kept.before_BUD, normed_B1D)
    )


def _one_chunk(states_BCD: jax.Array, arrived: Arrived, lengths_B: jax.Array) -> Batch:
    """A row of the last C tokens, one chunk on the grid; where there are fewer, zeros stand before them as padding."""
    B, C, _ = states_BCD.shape
    place_1C = jnp.arange(C, dtype=jnp.int32)[None]
    segments_BC = (place_1C >= C - lengths_B[:, None]).astype(jnp.int32)
    zeros_BC = jnp.zeros((B, C), jnp.int32)
    return Batch(
        tokens=zeros_BC,
        targets=zeros_BC,
        segments=segments_BC,
        positions=zeros_BC,
        loss_mask=zeros_BC.astype(jnp.float32),
        neighbours=arrived.tokens_BKR[:, None],
        neighbour_mask=arrived.mask_BKR[:, None],
    )


def _numbers(lengths_B: jax.Array) -> jax.Array:
    return jnp.arange(lengths_B.shape[0], dtype=jnp.uint32)
