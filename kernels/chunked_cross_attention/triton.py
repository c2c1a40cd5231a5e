"""Attention of a chunk's readers to all keys of its neighbours, one program a chunk and key/value head, forward and backward.

Of a chunk b, l and a key/value head g a program holds the M = C N / G queries of the tokens that read it, the N / G query heads
of a token side by side, and its S keys:

    P = softmax(Q K^T / sqrt(H) + mask)    O = P V
    dV = P^T dO    dP = dO V^T    dS = P (dP - rowsum(P dP)) / sqrt(H)    dQ = dS K    dK = dS^T Q

Each key is read by one program alone, so keys and values are read once, gradients are written once, and nothing is accumulated
in memory: results are the same in every run. Q, K, V and dO lie in shared memory, scores in registers. Where S is more than a
tile of BLOCK_S the softmax goes on from tile to tile, and rowsum(P dP) is taken as rowsum(O dO); where M is more than BLOCK_M as
well, dQ has a kernel of its own. The shift of queries to the chunk that they read is in the addresses. Masked keys are not
loaded, nor is anything of a chunk without neighbours. What no chunk's program writes, tokens that read nothing, the first and
the last chunk's programs set to zero.

Bytes: Q, K, V, O forward and Q, K, V, dO, dQ, dK, dV backward, 2 (2 M + 2 S) H and 2 (3 M + 4 S) H in bfloat16, for 4 M S H and
10 M S H operations: M S / (M + S) = 51 operations a byte forward at C = 64, S = 256 without grouped queries, below the 295 at
which an H100 computes as long as it reads. Grouped queries raise it, to 171 with 8 heads a group.
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

from retro_jax.kernels.choice import gpu_capability
from retro_jax.kernels.chunked_cross_attention.shapes import Blocks, backward_blocks, forward_blocks
from retro_jax.kernels.triton_call import call, folds_batch

LOWEST: tl.constexpr = tl.constexpr(-1e30)


class Call(NamedTuple):
    """What is fixed of a call when it is traced."""

    name: str
    chunk_len: int
    dropout: float


def chunked_cross_attention(
    q_BTNH: jax.Array,
    k_BLSGH: jax.Array,
    v_BLSGH: jax.Array,
    key_mask_BLS: jax.Array | None,
    null_logit_N: jax.Array | None,
    *,
    chunk_len: int,
    first_chunk_len: jax.Array | int,
    dropout: float = 0.0,
    keep_BTNS: jax.Array | None = None,
    name: str = "cca",
) -> jax.Array:
    """See :func:`retro_jax.kernels.chunked_cross_attention.chunked_cross_attention`; no mask: all keys are valid."""
    first_B = jnp.broadcast_to(jnp.asarray(first_chunk_len, jnp.int32), q_BTNH.shape[:1])
    how = Call(name, chunk_len, dropout)
    return _attend(how, q_BTNH, k_BLSGH, v_BLSGH, key_mask_BLS, first_B, null_logit_N, keep_BTNS)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: Call, q, k, v, mask, first, null, keep):
    return _forward(how, q, k, v, mask, first, null, keep)[0]


def _attend_fwd(how, q, k, v, mask, first, null, keep):
    o, lse = _forward(how, q, k, v, mask, first, null, keep)
    o, lse = checkpoint_name(o, f"{how.name}_out"), checkpoint_name(lse, f"{how.name}_lse")
    tiled = _backward_blocks(how, q, k).keys < k.shape[2]
    return o, (q, k, v, mask, first, null, keep, o if tiled else None, lse)


def _attend_bwd(how, residuals, do):
    q, k, v, mask, first, null, keep, o, lse = residuals
    null_BN = None if null is None else jnp.broadcast_to(null, (q.shape[0], *null.shape))
    dq, dk, dv, dnull_BTN = folds_batch(partial(_launch_backward, how))(
        q, k, v, mask, first, null_BN, keep, o, lse, do.astype(q.dtype)
    )
    dnull = None if null is None else dnull_BTN.sum((0, 1)).astype(null.dtype)
    return dq, dk, dv, None, None, dnull, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(how, q, k, v, mask, first, null, keep):
    null_BN = None if null is None else jnp.broadcast_to(null, (q.shape[0], *null.shape))
    return folds_batch(partial(_launch_forward, how))(q, k, v, mask, first, null_BN, keep)


def _launch_forward(how, q, k, v, mask, first, null, keep):
    (B, T, N, _), (_, L, _, G, _) = q.shape, k.shape
    blocks = forward_blocks(how.chunk_len * (N // G), *k.shape[2::2], q.dtype)
    return call(
        cca_forward,
        *(q, k, v, _or(mask, first), first, _or(null, first), _or(keep, first)),
        outputs=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)),
        grid=(B * L, G, -(-how.chunk_len * (N // G) // blocks.queries)),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **_constants(how, q, k, mask, null, keep, blocks),
    )


def _launch_backward(how, q, k, v, mask, first, null, keep, o, lse, do):
    (B, T, N, _), (_, L, S, G, _) = q.shape, k.shape
    blocks = _backward_blocks(how, q, k)
    query_tiles = -(-how.chunk_len * (N // G) // blocks.queries)
    operands = (q, k, v, _or(mask, first), first, _or(null, first), _or(keep, first), _or(o, q), lse, do)
    like_q, like_k, like_v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    like_null = jax.ShapeDtypeStruct((B, T, N) if null is not None else (B, 1, 1), jnp.float32)
    launch = partial(
        call,
        num_warps=blocks.warps,
        **_constants(how, q, k, mask, null, keep, blocks),
    )
    outputs = (like_q, like_k, like_v, like_null)
    results = launch(cca_backward, *operands, outputs=outputs, grid=(B * L, G), num_stages=blocks.stages)
    if blocks.keys >= S or query_tiles == 1:
        return results
    grid = (B * L, G, query_tiles)
    dq, dnull = launch(cca_query_gradient, *operands, outputs=(like_q, like_null), grid=grid, num_stages=2)
    return dq, results[1], results[2], dnull


def _backward_blocks(how: Call, q: jax.Array, k: jax.Array) -> Blocks:
    return backward_blocks(how.chunk_len * (q.shape[2] // k.shape[3]), *k.shape[2::2], q.dtype, gpu_capability())


def _or(array: jax.Array | None, other: jax.Array) -> jax.Array:
    """The array, or one that stands in its place and is not read."""
    return other if array is None else array


def _constants(how, q, k, mask, null, keep, blocks) -> dict[str, Any]:
    (_, T, N, H), (_, L, S, G, _) = q.shape, k.shape
    return {
        "SCALE": H**-0.5,
        "KEPT": 1.0 - how.dropout,
        "HAS_MASK": mask is not None,
        "HAS_NULL": null is not None,
        "HAS_KEEP": keep is not None,
        "PRECISION": "ieee" if q.dtype == jnp.float32 else "tf32",
        **{"T": T, "L": L, "C": how.chunk_len, "S": S, "N": N, "G": G, "H": H},
        "BLOCK_M": blocks.queries,
        "BLOCK_S": blocks.keys,
        "BLOCK_H": triton.next_power_of_2(max(16, H)),
    }


@triton.jit
def _queries(i, l, first, T, C, N, GROUP, BLOCK_M: tl.constexpr):
    """Of tile i: each query's place among the row's queries of head 0 of the group, its head in the group, and whether there is
    such a query."""
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    token = m // GROUP
    t = l * C + first - 1 + token
    return t * N + m % GROUP, m % GROUP, (token < C) & (t >= 0) & (t < T)


@triton.jit
def _zeros(ptr, start, end, N, GROUP, WIDTH, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Zero the vectors of tokens start to end, of the heads of a group."""
    w = tl.arange(0, BLOCK_W)
    m = start * GROUP + tl.arange(0, BLOCK_M)
    while tl.min(m, 0) < end * GROUP:
        at = ((m // GROUP) * N + m % GROUP)[:, None] * WIDTH + w[None, :]
        inside = (m < end * GROUP)[:, None] & (w < WIDTH)[None, :]
        tl.store(ptr + at, tl.zeros((BLOCK_M, BLOCK_W), ptr.dtype.element_ty), mask=inside)
        m += BLOCK_M


@triton.jit
def _zero_unread(
    ptr, l, first,
    T: tl.constexpr, L: tl.constexpr, C: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Zero the tokens before those that read chunk 0, and after those that read the last."""
    if l == 0:
        _zeros(ptr, 0, tl.minimum(first - 1, T), N, GROUP, WIDTH, BLOCK_M, BLOCK_W)
    if l == L - 1:
        _zeros(ptr, L * C + first - 1, T, N, GROUP, WIDTH, BLOCK_M, BLOCK_W)


@triton.jit
def _load_keys(
    k_ptr, v_ptr, valid_ptr, j, h,
    S: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of tile j: keys' numbers, which are valid, their places, keys and values; zeros where a key is not valid."""
    s = j * BLOCK_S + tl.arange(0, BLOCK_S)
    seen = s < S
    if HAS_MASK:
        seen = seen & (tl.load(valid_ptr + s, mask=seen, other=0) != 0)
    at = s[:, None] * (G * H) + h[None, :]
    valid = seen[:, None] & (h < H)[None, :]
    return s, seen, at, tl.load(k_ptr + at, mask=valid, other=0.0), tl.load(v_ptr + at, mask=valid, other=0.0)


@triton.jit
def _kept(keep_ptr, row, s, there, S: tl.constexpr):
    """Which weights dropout keeps."""
    at = row.to(tl.int64)[:, None] * S + s[None, :]
    return tl.load(keep_ptr + at, mask=there[:, None] & (s < S)[None, :], other=0) != 0


@triton.jit
def cca_forward(
    q_ptr, k_ptr, v_ptr, valid_ptr, first_ptr, null_ptr, keep_ptr,
    o_ptr, lse_ptr,
    SCALE: tl.constexpr, KEPT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_NULL: tl.constexpr, HAS_KEEP: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, L: tl.constexpr, C: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    G: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """O and log-sum-exp of a tile of the queries that read a chunk, of one key/value head."""
    GROUP: tl.constexpr = N // G
    TILES: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    chunk = tl.program_id(0).to(tl.int64)
    g, i = tl.program_id(1), tl.program_id(2)
    b, l = chunk // L, (chunk % L).to(tl.int32)
    at_row, at_key = b * T * N + g * GROUP, (chunk * S * G + g) * H  # what is added to them counts in 32 bits
    first = tl.load(first_ptr + b)
    h = tl.arange(0, BLOCK_H)
    row, p, there = _queries(i, l, first, T, C, N, GROUP, BLOCK_M)
    at_q, is_q = row[:, None] * H + h[None, :], there[:, None] & (h < H)[None, :]
    q = tl.load(q_ptr + at_row * H + at_q, mask=is_q, other=0.0)

    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_NULL:
        peak = tl.load(null_ptr + b * N + g * GROUP + p).to(tl.float32)
        total += 1.0
    o = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for j in range(0, TILES):
        s, seen, _, k, v = _load_keys(
            k_ptr + at_key, v_ptr + at_key, valid_ptr + chunk * S, j, h, S, G, H, HAS_MASK, BLOCK_S
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
        scores = tl.where(seen[None, :], scores, LOWEST)
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        if TILES > 1 or HAS_NULL:
            total *= tl.exp(peak - higher)
        if TILES > 1:
            o *= tl.exp(peak - higher)[:, None]
        total += tl.sum(weights, 1)
        if HAS_KEEP:
            weights = tl.where(_kept(keep_ptr + at_row * S, row, s, there, S), weights / KEPT, 0.0)
        o += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        peak = higher
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    tl.store(o_ptr + at_row * H + at_q, (o / total[:, None]).to(o_ptr.dtype.element_ty), mask=is_q)
    tl.store(lse_ptr + at_row + row, tl.where(dead, -LOWEST, peak + tl.log(total)), mask=there)
    if i == 0:
        _zero_unread(o_ptr + at_row * H, l, first, T, L, C, N, GROUP, H, BLOCK_M, BLOCK_H)
        _zero_unread(lse_ptr + at_row, l, first, T, L, C, N, GROUP, 1, BLOCK_M, 1)


@triton.jit
def _load_queries(
    q_ptr, do_ptr, o_ptr, lse_ptr, i, l, first, h,
    T: tl.constexpr, C: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr,
    HAS_O: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of tile i: places, which are there, queries, dO, log-sum-exp and, with O, rowsum(O dO)."""
    row, _, there = _queries(i, l, first, T, C, N, GROUP, BLOCK_M)
    at, is_q = row[:, None] * H + h[None, :], there[:, None] & (h < H)[None, :]
    q = tl.load(q_ptr + at, mask=is_q, other=0.0)
    do = tl.load(do_ptr + at, mask=is_q, other=0.0)
    lse = tl.load(lse_ptr + row, mask=there, other=-LOWEST)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_O:
        o = tl.load(o_ptr + at, mask=is_q, other=0.0)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    return row, there, q, do, lse, delta


@triton.jit
def _weights(
    q, k, v, do, lse, seen, row, s, there, keep_ptr,
    SCALE: tl.constexpr, KEPT: tl.constexpr, HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """P, what dropout leaves of it, and dP."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
    weights = tl.where(seen[None, :], tl.exp(scores - lse[:, None]), 0.0)
    dweights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    left = weights
    if HAS_KEEP:
        keep = _kept(keep_ptr, row, s, there, S)
        left, dweights = tl.where(keep, weights / KEPT, 0.0), tl.where(keep, dweights / KEPT, 0.0)
    return weights, left, dweights


@triton.jit
def _store_queries(
    dq_ptr, dnull_ptr, null_ptr, dq, lse, delta, i, l, first, h,
    T: tl.constexpr, C: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr,
    HAS_NULL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dQ of tile i, and dS of attending to nothing, whose value is zero."""
    row, p, there = _queries(i, l, first, T, C, N, GROUP, BLOCK_M)
    at = row[:, None] * H + h[None, :]
    tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=there[:, None] & (h < H)[None, :])
    if HAS_NULL:
        logit = tl.load(null_ptr + p).to(tl.float32)
        tl.store(dnull_ptr + row, -tl.exp(logit - lse) * delta, mask=there)


@triton.jit
def cca_backward(
    q_ptr, k_ptr, v_ptr, valid_ptr, first_ptr, null_ptr, keep_ptr, o_ptr, lse_ptr, do_ptr,
    dq_ptr, dk_ptr, dv_ptr, dnull_ptr,
    SCALE: tl.constexpr, KEPT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_NULL: tl.constexpr, HAS_KEEP: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, L: tl.constexpr, C: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    G: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk and key/value head where its queries or its keys are one tile; else those of keys and values."""
    GROUP: tl.constexpr = N // G
    KEY_TILES: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    QUERY_TILES: tl.constexpr = (C * GROUP + BLOCK_M - 1) // BLOCK_M
    HAS_O: tl.constexpr = KEY_TILES > 1
    chunk = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    b, l = chunk // L, (chunk % L).to(tl.int32)
    at_row, at_key = b * T * N + g * GROUP, (chunk * S * G + g) * H
    first = tl.load(first_ptr + b)
    h = tl.arange(0, BLOCK_H)
    q_ptr, do_ptr, o_ptr, lse_ptr = q_ptr + at_row * H, do_ptr + at_row * H, o_ptr + at_row * H, lse_ptr + at_row
    dq_ptr, dnull_ptr, null_ptr = dq_ptr + at_row * H, dnull_ptr + at_row, null_ptr + b * N + g * GROUP
    if QUERY_TILES == 1:
        row, there, q, do, lse, delta = _load_queries(
            q_ptr, do_ptr, o_ptr, lse_ptr, 0, l, first, h, T, C, N, GROUP, H, HAS_O, BLOCK_M
        )
    dq = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for j in range(0, KEY_TILES):
        s, seen, at_k, k, v = _load_keys(
            k_ptr + at_key, v_ptr + at_key, valid_ptr + chunk * S, j, h, S, G, H, HAS_MASK, BLOCK_S
        )  # fmt: skip
        dk = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
        dv = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
        for i in range(0, QUERY_TILES):
            if QUERY_TILES > 1:
                row, there, q, do, lse, delta = _load_queries(
                    q_ptr, do_ptr, o_ptr, lse_ptr, i, l, first, h, T, C, N, GROUP, H, HAS_O, BLOCK_M
                )
            weights, left, dweights = _weights(
                q, k, v, do, lse, seen, row, s, there, keep_ptr + at_row * S, SCALE, KEPT, HAS_KEEP, PRECISION, S
            )
            if KEY_TILES == 1:
                delta = tl.sum(weights * dweights, 1)
            dscores = (weights * (dweights - delta[:, None]) * SCALE).to(q.dtype)
            dv += tl.dot(tl.trans(left.to(do.dtype)), do, input_precision=PRECISION)
            dk += tl.dot(tl.trans(dscores), q, input_precision=PRECISION)
            if KEY_TILES == 1:
                dq = tl.dot(dscores, k, input_precision=PRECISION)
                _store_queries(dq_ptr, dnull_ptr, null_ptr, dq, lse, delta, i, l, first, h, T, C, N, GROUP, H, HAS_NULL, BLOCK_M)
            elif QUERY_TILES == 1:
                dq += tl.dot(dscores, k, input_precision=PRECISION)
        is_key = (s < S)[:, None] & (h < H)[None, :]
        tl.store(dk_ptr + at_key + at_k, dk.to(dk_ptr.dtype.element_ty), mask=is_key)
        tl.store(dv_ptr + at_key + at_k, dv.to(dv_ptr.dtype.element_ty), mask=is_key)
    if KEY_TILES > 1 and QUERY_TILES == 1:
        _store_queries(dq_ptr, dnull_ptr, null_ptr, dq, lse, delta, 0, l, first, h, T, C, N, GROUP, H, HAS_NULL, BLOCK_M)
    if KEY_TILES == 1 or QUERY_TILES == 1:
        _zero_unread(dq_ptr, l, first, T, L, C, N, GROUP, H, BLOCK_M, BLOCK_H)
        if HAS_NULL:
            _zero_unread(dnull_ptr, l, first, T, L, C, N, GROUP, 1, BLOCK_M, 1)


@triton.jit
def cca_query_gradient(
    q_ptr, k_ptr, v_ptr, valid_ptr, first_ptr, null_ptr, keep_ptr, o_ptr, lse_ptr, do_ptr,
    dq_ptr, dnull_ptr,
    SCALE: tl.constexpr, KEPT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_NULL: tl.constexpr, HAS_KEEP: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, L: tl.constexpr, C: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    G: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries, where both queries and keys are several tiles."""
    GROUP: tl.constexpr = N // G
    TILES: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    chunk = tl.program_id(0).to(tl.int64)
    g, i = tl.program_id(1), tl.program_id(2)
    b, l = chunk // L, (chunk % L).to(tl.int32)
    at_row, at_key = b * T * N + g * GROUP, (chunk * S * G + g) * H
    first = tl.load(first_ptr + b)
    h = tl.arange(0, BLOCK_H)
    row, there, q, do, lse, delta = _load_queries(
        q_ptr + at_row * H, do_ptr + at_row * H, o_ptr + at_row * H, lse_ptr + at_row,
        i, l, first, h, T, C, N, GROUP, H, True, BLOCK_M,
    )  # fmt: skip
    dq = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for j in range(0, TILES):
        s, seen, _, k, v = _load_keys(
            k_ptr + at_key, v_ptr + at_key, valid_ptr + chunk * S, j, h, S, G, H, HAS_MASK, BLOCK_S
        )  # fmt: skip
        weights, _, dweights = _weights(
            q, k, v, do, lse, seen, row, s, there, keep_ptr + at_row * S, SCALE, KEPT, HAS_KEEP, PRECISION, S
        )  # fmt: skip
        dscores = (weights * (dweights - delta[:, None]) * SCALE).to(q.dtype)
        dq += tl.dot(dscores, k, input_precision=PRECISION)
    dq_ptr, dnull_ptr, null_ptr = dq_ptr + at_row * H, dnull_ptr + at_row, null_ptr + b * N + g * GROUP
    _store_queries(dq_ptr, dnull_ptr, null_ptr, dq, lse, delta, i, l, first, h, T, C, N, GROUP, H, HAS_NULL, BLOCK_M)
    if i == 0:
        _zero_unread(dq_ptr, l, first, T, L, C, N, GROUP, H, BLOCK_M, BLOCK_H)
        if HAS_NULL:
            _zero_unread(dnull_ptr, l, first, T, L, C, N, GROUP, 1, BLOCK_M, 1)
