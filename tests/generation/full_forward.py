"""A whole row through a model's layers with any table of who reads which neighbours: one token at a time in CCA, nothing kept."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.data.batch import Batch
from retro_jax.generation.neighbours import Found
from retro_jax.kernels.attention import KeyMask
from retro_jax.kernels.attention.reference import attention
from retro_jax.model import Retro
from retro_jax.model.attention import causal_mask
from retro_jax.model.cca import ChunkedCrossAttention, causal_convolution
from retro_jax.model.layers import rotate

PADDED = 32


def logits_by_table(model: Retro, tokens_T: np.ndarray, sets: Sequence[tuple[int, np.ndarray, Found]]) -> np.ndarray:
    """Logits [T, V] of one row.

    Args:
        model: any.
        tokens_T: the row.
        sets: (end, text, neighbours): from token end - 1 on, until the next set's, tokens read these neighbours, encoded given
            the states of the tokens of the text, which ends there.
    """
    graph, state = nnx.split(model)
    sizes = tuple((end, len(text)) for end, text, _ in sets)
    neighbours = [(found.tokens_QKR, found.mask_QKR) for _, _, found in sets]
    return np.asarray(_logits(graph, state, tokens_T, neighbours, sizes))


def _logits(graph, state, tokens_T, neighbours, sizes):
    model = nnx.merge(graph, state)
    T = -(-len(tokens_T) // PADDED) * PADDED  # one length for many: what runs is compiled for each
    inside_1T = (np.arange(T) < len(tokens_T))[None]
    segments_1T, positions_1T = jnp.asarray(inside_1T.astype(np.int32)), jnp.asarray((np.arange(T) * inside_1T).astype(np.int32))
    x_1TD = model.embed(jnp.pad(jnp.asarray(tokens_T), (0, T - len(tokens_T)))[None], positions_1T)
    encoded = None
    for layer in model.layers():
        x_1TD = x_1TD + layer.attention(layer.norm_attention(x_1TD), causal_mask(segments_1T), positions_1T, None)
        if layer.cca is not None and neighbours:
            normed_1TD = layer.norm_cca(x_1TD)
            if encoded is None:
                encoded = [_encode(model, normed_1TD, *of, *size) for of, size in zip(neighbours, sizes, strict=True)]
            x_1TD = x_1TD + _read(layer.cca, normed_1TD, encoded, [end for end, _ in sizes], len(tokens_T))
        x_1TD = layer.finish(x_1TD, None, [None, None])
    hidden_1TD = x_1TD if model.final_norm is None else model.final_norm(x_1TD)
    return jnp.einsum("td,vd->tv", hidden_1TD[0], model.output_table_VD())[: len(tokens_T)]


def _encode(model: Retro, normed_1TD: jax.Array, tokens_KR: np.ndarray, mask_KR: np.ndarray, end: int, length: int):
    """Encoded neighbours [K, R, D], which of their tokens are attended, and whether they are read at all."""
    C = model.config.retro.chunks.chunk_len
    states = jnp.pad(normed_1TD[:, end - length : end], ((0, 0), (0, C - length), (0, 0)))
    inside = (np.arange(C) < length).astype(np.int32)[None]
    batch = Batch(
        tokens=inside, targets=inside, segments=inside, positions=inside, loss_mask=inside.astype(np.float32),
        neighbours=tokens_KR[None, None], neighbour_mask=mask_KR[None, None], first_chunk_len=np.array([length], np.int32),
    )  # fmt: skip
    neighbours = model.encode_chunks(states, jax.tree.map(jnp.asarray, batch), jnp.zeros(1, jnp.uint32))
    return neighbours.encoded_BLKRD[0, 0], neighbours.mask_BLKR[0, 0], bool(mask_KR.any())


def _read(cca: ChunkedCrossAttention, normed_1TD: jax.Array, encoded: list, ends: list[int], length: int) -> jax.Array:
    """Token by token, by the definition: 0 where nothing is read."""
    C = cca.retro.chunks.chunk_len
    mixed_1TD = normed_1TD
    if cca.query_conv is not None:
        mixed_1TD = causal_convolution(normed_1TD, cca.query_conv[...], jnp.zeros_like(normed_1TD[:, :1]), None)
    queries_1TNH = cca.query(mixed_1TD)
    reads = []
    for token in range(length):
        read = [number for number, end in enumerate(ends) if end - 1 <= token]
        if not read or not encoded[read[-1]][2]:
            reads.append(jnp.zeros_like(normed_1TD[0, 0]))
            continue
        states_KRD, mask_KR, _ = encoded[read[-1]]
        K, R, _ = states_KRD.shape
        q_11NH, place = queries_1TNH[:, token : token + 1], token - (ends[read[-1]] - 1) + C - 1
        keys_of = states_KRD
        if cca.key_conv is not None:
            keys_of = causal_convolution(states_KRD, cca.key_conv[...], jnp.zeros_like(states_KRD[:, :1]), None)
        k_KRGH, v_KRGH = cca.project_keys_and_values(states_KRD, keys_of)
        if cca.retro.cca_positions == "rotary":
            turn = {"fraction": cca.shape.rotary_fraction, "base": cca.shape.rotary_base, "scale": 1.0}
            q_11NH = rotate(q_11NH, jnp.full((1, 1), place, jnp.int32), **turn)
            k_KRGH = rotate(k_KRGH, jnp.arange(R, dtype=jnp.int32)[None], **turn)
        k_1SGH, v_1SGH = (a.reshape(1, K * R, *a.shape[2:]) for a in (k_KRGH, v_KRGH))
        null = None if cca.null_logit is None else cca.null_logit[...]
        o_11NH = attention(q_11NH, k_1SGH, v_1SGH, KeyMask(mask_KR.reshape(1, K * R)), null)
        gate = cca.gate[...] if cca.gate is not None else cca.retro.gate
        reads.append((cca.out(o_11NH) * gate)[0, 0])
    return jnp.pad(jnp.stack(reads), ((0, normed_1TD.shape[1] - length), (0, 0)))[None]
