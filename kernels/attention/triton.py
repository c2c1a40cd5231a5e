"""Attention on GPUs by Triton. Few keys, under a key mask: a program holds them all, as in chunked cross-attention with one chunk
a problem. Causal rows: FlashAttention-2 (Dao, 2023), in tiles of queries and keys.

A program of the forward pass holds a tile of queries of one head and takes tiles of keys in turn, from the first one of the
oldest segment among its queries to its own place: with documents packed into a row, what they cannot see is never read. Two
kernels make the gradients, one a tile of keys of a key/value head (dK, dV, over all query heads of the group), one a tile of
queries (dQ); none adds to what another wrote. 4 Q S H / 2 operations on (2 Q + 2 S) H numbers: bound by arithmetic from some
hundred tokens on.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.ad_checkpoint import checkpoint_name

from retro_jax.kernels.attention.masks import CausalMask, Mask
from retro_jax.kernels.attention.shapes import Blocks, key_gradient_blocks, query_blocks
from retro_jax.kernels.chunked_cross_attention.triton import chunked_cross_attention
from retro_jax.kernels.triton_call import call, folds_batch

LOWEST: tl.constexpr = tl.constexpr(-1e30)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """int32 of a causal mask, each with the batch first: segments of queries and keys, the place where each key's segment begins,
    where it ends, and the place of the first query, [X]."""

    segments_XQ: jax.Array
    key_segments_XS: jax.Array
    begin_XS: jax.Array
    end_XS: jax.Array
    first_X: jax.Array


def attention(
    q_XQNH: jax.Array,
    k_XSGH: jax.Array,
    v_XSGH: jax.Array,
    mask: Mask | None,
    null_logit_N: jax.Array | None,
    *,
    dropout: float = 0.0,
    keep_XNQS: jax.Array | None = None,
    name: str = "attention",
) -> jax.Array:
    """See :func:`retro_jax.kernels.attention.attention`."""
    if isinstance(mask, CausalMask):
        assert null_logit_N is None and keep_XNQS is None
        return _causal(name, q_XQNH, k_XSGH, v_XSGH, rows(mask))
    return chunked_cross_attention(
        q_XQNH,
        k_XSGH[:, None],
        v_XSGH[:, None],
        None if mask is None else mask.valid_XS[:, None],
        null_logit_N,
        chunk_len=q_XQNH.shape[1],
        first_chunk_len=1,  # token 0 is the first that reads
        dropout=dropout,
        keep_BTNS=None if keep_XNQS is None else keep_XNQS.swapaxes(1, 2),
        name=name,
    )


def rows(mask: CausalMask) -> Rows:
    """What the kernels read of a mask."""
    segments_XS = mask.key_segments_XS
    X, S = segments_XS.shape
    place_XS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (X, S))
    changes = segments_XS[:, 1:] != segments_XS[:, :-1]
    begins = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    first = jnp.int32(0) if mask.first is None else mask.first
    return Rows(
        mask.segments_XQ,
        segments_XS,
        jax.lax.cummax(jnp.where(begins, place_XS, 0), axis=1),
        jax.lax.cummin(jnp.where(ends, place_XS + 1, S), axis=1, reverse=True),
        jnp.broadcast_to(first, (X,)),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(name: str, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> jax.Array:
    return folds_batch(_launch_forward)(q, k, v, rows)[0]


def _causal_fwd(name, q, k, v, rows):
    o, lse = folds_batch(_launch_forward)(q, k, v, rows)
    o, lse = checkpoint_name(o, f"{name}_out"), checkpoint_name(lse, f"{name}_lse")
    return o, (q, k, v, rows, o, lse)


def _causal_bwd(name, residuals, do):
    q, k, v, rows, o, lse = residuals
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1)
    return *folds_batch(_launch_backward)(q, k, v, rows, lse, delta, do.astype(q.dtype)), None


_causal.defvjp(_causal_fwd, _causal_bwd)


def _launch_forward(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> tuple[jax.Array, ...]:
    X, Q, N, H = q.shape
    blocks = query_blocks(Q, k.shape[1], H, q.dtype)
    return call(
        causal_forward,
        *(q, k, v, *rows),
        outputs=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((X, Q, N), jnp.float32)),
        grid=(-(-Q // blocks.queries) * X * N,),
        **_settings(q, k, blocks),
    )


def _launch_backward(q, k, v, rows, lse, delta, do):
    (X, Q, N, H), (_, S, G, _) = q.shape, k.shape
    of_queries, of_keys = query_blocks(Q, S, H, q.dtype, backward=True), key_gradient_blocks(Q, S, H, q.dtype)
    like_q, like_k, like_v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    operands = (q, k, v, *rows, lse, delta, do)
    (dq,) = call(
        causal_query_gradient,
        *operands,
        outputs=(like_q,),
        grid=(-(-Q // of_queries.queries) * X * N,),
        **_settings(q, k, of_queries),
    )
    dk, dv = call(
        causal_key_gradient,
        *operands,
        outputs=(like_k, like_v),
        grid=(-(-S // of_keys.keys) * X * G,),
        **_settings(q, k, of_keys),
    )
    return dq, dk, dv


def _settings(q: jax.Array, k: jax.Array, blocks: Blocks) -> dict[str, Any]:
    (_, Q, N, H), (_, S, G, _) = q.shape, k.shape
    return {
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "SCALE": H**-0.5,
        "PRECISION": "ieee" if q.dtype == jnp.float32 else "tf32",
        **{"Q": Q, "S": S, "N": N, "G": G, "H": H},
        "BLOCK_Q": blocks.queries,
        "BLOCK_S": blocks.keys,
        "BLOCK_H": triton.next_power_of_2(H),
    }


@triton.jit
def _place(length: tl.constexpr, BLOCK: tl.constexpr, heads: tl.constexpr):
    """This program's tile, row and head, tiles innermost. CUDA's second dim ends at 65,535, too few for the rows and heads."""
    tiles: tl.constexpr = (length + BLOCK - 1) // BLOCK
    problem = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles, problem // heads, problem % heads


@triton.jit
def _load(ptr, start, index, count, step, h, H: tl.constexpr):
    """Vectors ``index`` of one head, zeros beyond ``count``; ``step`` numbers lie between two. What is
    added to ``start`` counts in 32 bits."""
    at = index[:, None] * step + h[None, :]
    return tl.load(ptr + start + at, mask=(index < count)[:, None] & (h < H)[None, :], other=0.0)


@triton.jit
def _store(ptr, values, start, index, count, step, h, H: tl.constexpr):
    """The inverse of :func:`_load`."""
    at = index[:, None] * step + h[None, :]
    tl.store(ptr + start + at, values.to(ptr.dtype.element_ty), mask=(index < count)[:, None] & (h < H)[None, :])


@triton.jit
def _seen(place, segment, s, key_segment):
    """Which keys the queries see, [queries, keys]."""
    return (place[:, None] >= s[None, :]) & (segment[:, None] == key_segment[None, :]) & (segment > 0)[:, None]


@triton.jit
def _key_tiles(begin_ptr, x, first, i, Q, S, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """The tiles of keys that a tile of queries sees: the first, and the one after the last."""
    begin = tl.load(begin_ptr + x.to(tl.int64) * S + tl.minimum(first + i * BLOCK_Q, S - 1))
    end = tl.minimum(first + tl.minimum((i + 1) * BLOCK_Q, Q), S)
    return begin // BLOCK_S, (end + BLOCK_S - 1) // BLOCK_S


@triton.jit
def causal_forward(
    q_ptr, k_ptr, v_ptr, segment_ptr, key_segment_ptr, begin_ptr, end_ptr, first_ptr,
    o_ptr, lse_ptr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """O and the base-2 log-sum-exp of a tile of queries of one head."""
    i, x, n = _place(Q, BLOCK_Q, N)
    i = (Q + BLOCK_Q - 1) // BLOCK_Q - 1 - i  # those with most keys first
    first = tl.load(first_ptr + x)
    m, h = i * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_H)
    at_q = (x.to(tl.int64) * Q * N + n) * H
    at_k = (x.to(tl.int64) * S * G + n // (N // G)) * H
    q = _load(q_ptr, at_q, m, Q, N * H, h, H)
    segment = tl.load(segment_ptr + x.to(tl.int64) * Q + m, mask=m < Q, other=0)
    peak = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    o = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
    low, high = _key_tiles(begin_ptr, x, first, i, Q, S, BLOCK_Q, BLOCK_S)
    for j in range(low, high):
        s = j * BLOCK_S + tl.arange(0, BLOCK_S)
        k = _load(k_ptr, at_k, s, S, G * H, h, H)
        key_segment = tl.load(key_segment_ptr + x.to(tl.int64) * S + s, mask=s < S, other=0)
        seen = _seen(first + m, segment, s, key_segment)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2E)
        scores = tl.where(seen, scores, LOWEST)
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = _load(v_ptr, at_k, s, S, G * H, h, H)
        o = o * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        peak = higher
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    _store(o_ptr, o / total[:, None], at_q, m, Q, N * H, h, H)
    lse = tl.where(dead, -LOWEST, peak + tl.log2(total))
    tl.store(lse_ptr + (x.to(tl.int64) * Q + m) * N + n, lse, mask=m < Q)


@triton.jit
def causal_query_gradient(
    q_ptr, k_ptr, v_ptr, segment_ptr, key_segment_ptr, begin_ptr, end_ptr, first_ptr, lse_ptr, delta_ptr, do_ptr,
    dq_ptr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries of one head."""
    i, x, n = _place(Q, BLOCK_Q, N)
    i = (Q + BLOCK_Q - 1) // BLOCK_Q - 1 - i
    first = tl.load(first_ptr + x)
    m, h = i * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_H)
    at_q = (x.to(tl.int64) * Q * N + n) * H
    at_k = (x.to(tl.int64) * S * G + n // (N // G)) * H
    q = _load(q_ptr, at_q, m, Q, N * H, h, H)
    do = _load(do_ptr, at_q, m, Q, N * H, h, H)
    segment = tl.load(segment_ptr + x.to(tl.int64) * Q + m, mask=m < Q, other=0)
    at_row = (x.to(tl.int64) * Q + m) * N + n
    lse = tl.load(lse_ptr + at_row, mask=m < Q, other=-LOWEST)
    delta = tl.load(delta_ptr + at_row, mask=m < Q, other=0.0)
    dq = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
    low, high = _key_tiles(begin_ptr, x, first, i, Q, S, BLOCK_Q, BLOCK_S)
    for j in range(low, high):
        s = j * BLOCK_S + tl.arange(0, BLOCK_S)
        k = _load(k_ptr, at_k, s, S, G * H, h, H)
        v = _load(v_ptr, at_k, s, S, G * H, h, H)
        key_segment = tl.load(key_segment_ptr + x.to(tl.int64) * S + s, mask=s < S, other=0)
        seen = _seen(first + m, segment, s, key_segment)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2E)
        weights = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        dweights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dscores = (weights * (dweights - delta[:, None]) * SCALE).to(k.dtype)
        dq += tl.dot(dscores, k, input_precision=PRECISION)
    _store(dq_ptr, dq, at_q, m, Q, N * H, h, H)


@triton.jit
def causal_key_gradient(
    q_ptr, k_ptr, v_ptr, segment_ptr, key_segment_ptr, begin_ptr, end_ptr, first_ptr, lse_ptr, delta_ptr, do_ptr,
    dk_ptr, dv_ptr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, S: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys of one key/value head."""
    GROUP: tl.constexpr = N // G
    j, x, g = _place(S, BLOCK_S, G)
    first = tl.load(first_ptr + x)
    s, h = j * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H)
    at_k = (x.to(tl.int64) * S * G + g) * H
    k = _load(k_ptr, at_k, s, S, G * H, h, H)
    v = _load(v_ptr, at_k, s, S, G * H, h, H)
    key_segment = tl.load(key_segment_ptr + x.to(tl.int64) * S + s, mask=s < S, other=0)
    dk = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
    end = tl.load(end_ptr + x.to(tl.int64) * S + tl.minimum((j + 1) * BLOCK_S, S) - 1)
    low = tl.maximum(j * BLOCK_S - first, 0) // BLOCK_Q
    high = (tl.minimum(tl.maximum(end - first, 0), Q) + BLOCK_Q - 1) // BLOCK_Q
    for n in range(g * GROUP, (g + 1) * GROUP):
        at_q = (x.to(tl.int64) * Q * N + n) * H
        for i in range(low, high):
            m = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
            q = _load(q_ptr, at_q, m, Q, N * H, h, H)
            do = _load(do_ptr, at_q, m, Q, N * H, h, H)
            segment = tl.load(segment_ptr + x.to(tl.int64) * Q + m, mask=m < Q, other=0)
            at_row = (x.to(tl.int64) * Q + m) * N + n
            lse = tl.load(lse_ptr + at_row, mask=m < Q, other=-LOWEST)
            delta = tl.load(delta_ptr + at_row, mask=m < Q, other=0.0)
            seen = _seen(first + m, segment, s, key_segment)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2E)
            weights = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
            dv += tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
            dweights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            dscores = (weights * (dweights - delta[:, None]) * SCALE).to(q.dtype)
            dk += tl.dot(tl.trans(dscores), q, input_precision=PRECISION)
    _store(dk_ptr, dk, at_k, s, S, G * H, h, H)
    _store(dv_ptr, dv, at_k, s, S, G * H, h, H)
