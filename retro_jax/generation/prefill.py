"""The prompts' forward pass: logits of the first new token, and the cache that decoding goes on from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from retro_jax.data.batch import Batch
from retro_jax.generation.cache import Cache, LayerCache, Reading, last_of, with_slots
from retro_jax.model import Retro
from retro_jax.model.attention import causal_mask
from retro_jax.model.cca import ChunkedCrossAttention, Neighbours


def prefill(model: Retro, batch: Batch, slots: int) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after each prompt, and the cache.

    Args:
        model: with or without retrieval.
        batch: a prompt a row, padded to T tokens after its end, with the ``first_chunk_len`` that makes a chunk end with it. No
            neighbours (K = 0) leave the retrieval path out.
        slots: tokens a row that the cache has room for, T among them.
    """
    B, T = batch.tokens.shape
    lengths_B = (batch.segments > 0).sum(axis=1, dtype=jnp.int32)
    mask = causal_mask(batch.segments)
    x_BTD = model.embed(batch.tokens, batch.positions)
    neighbours: Neighbours | None = None
    reading: Reading | None = None
    layers = []
    for layer in model.layers():
        q, k_BTGH, v_BTGH = layer.attention.project(layer.norm_attention(x_BTD), batch.positions)
        x_BTD = x_BTD + layer.attention.read(q, k_BTGH, v_BTGH, mask)
        kept = LayerCache(with_slots(k_BTGH, slots), with_slots(v_BTGH, slots))
        if layer.cca is not None and layer.norm_cca is not None and reads_neighbours(model, batch):
            normed_BTD = layer.norm_cca(x_BTD)
            if neighbours is None:
                neighbours = model.encode_chunks(normed_BTD, batch, jnp.arange(B, dtype=jnp.uint32))
                reading = _reading(normed_BTD, neighbours, lengths_B, layer.cca.retro.chunks.chunk_len)
            x_BTD = x_BTD + layer.cca(normed_BTD, neighbours, None)
            kept = _with_neighbours(kept, layer.cca, normed_BTD, neighbours, lengths_B)
        x_BTD = layer.finish(x_BTD, None, [None, None])
        layers.append(kept)
    last_B1D = last_of(x_BTD, lengths_B, 1)
    cache = Cache(tuple(layers), reading, lengths_B, jnp.asarray(T, jnp.int32), jnp.asarray(0, jnp.int32))
    return next_logits(model, last_B1D), cache


def reads_neighbours(model: Retro, batch: Batch) -> bool:
    """Whether anything of the retrieval path is computed."""
    retro = model.config.retro
    return retro is not None and retro.gate != 0.0 and batch.neighbours.shape[2] > 0


def next_logits(model: Retro, x_B1D: jax.Array) -> jax.Array:
    """float32 logits [B, V] of the token after the one whose stream left the last layer."""
    return logits_of(model, x_B1D if model.final_norm is None else model.final_norm(x_B1D))


def logits_of(model: Retro, hidden_B1D: jax.Array) -> jax.Array:
    """float32 logits [B, V] from a hidden state a row, as :class:`Retro` gives them."""
    return jnp.einsum("bd,vd->bv", hidden_B1D[:, 0], model.output_table_VD(), preferred_element_type=jnp.float32)


def _reading(normed_BTD: jax.Array, neighbours: Neighbours, lengths_B: jax.Array, chunk_len: int) -> Reading:
    mask_BKR = _of_last_chunk(neighbours.mask_BLKR, lengths_B, chunk_len)
    reads_B = jnp.take_along_axis(neighbours.reads_BT, lengths_B[:, None] - 1, axis=1)[:, 0]
    states_BCD = last_of(normed_BTD, lengths_B, chunk_len)
    return Reading(mask_BKR.reshape(len(mask_BKR), -1), reads_B, jnp.asarray(0, jnp.int32), states_BCD)


def _with_neighbours(
    kept: LayerCache, cca: ChunkedCrossAttention, normed_BTD: jax.Array, neighbours: Neighbours, lengths_B: jax.Array
) -> LayerCache:
    encoded_BKRD = _of_last_chunk(neighbours.encoded_BLKRD, lengths_B, cca.retro.chunks.chunk_len)
    keys_BXGH, values_BXGH = cca.keep(encoded_BKRD)
    return LayerCache(kept.keys_BGSH, kept.values_BGSH, keys_BXGH, values_BXGH, last_of(normed_BTD, lengths_B, cca.reach))


def _of_last_chunk(x_BL: jax.Array, lengths_B: jax.Array, chunk_len: int) -> jax.Array:
    last_B = (lengths_B + chunk_len - 1) // chunk_len - 1
    index = last_B.reshape(-1, *(1,) * (x_BL.ndim - 1))
    return jnp.take_along_axis(x_BL, index, axis=1)[:, 0]
