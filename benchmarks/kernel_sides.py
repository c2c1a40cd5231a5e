"""Who computes an operation: this project's implementations, those that there are, and the rivals that are installed.

Every side computes the whole operation: for chunked cross-attention the rivals shift the queries to the chunk that they read and
the results back, by slices and padding, around attention with a chunk a problem.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases import AttentionCase, Case, CcaCase, LossCase
from retro_jax.kernels.precision import accumulation_dtype

Arrays = tuple[Any, ...]
Given = dict[str, Any]
Call = Callable[[Arrays, Given], Any]
LOSS_CHUNK = 2048


class Side(NamedTuple):
    """A way to compute a case: ``call`` takes its arrays with gradients and those without."""

    name: str
    call: Call
    ours: bool = False
    library: str = "jax"


def implementations(operation: str) -> tuple[str, ...]:
    """What an operation of ours offers beside its reference; nothing where the operation is not there."""
    module = f"retro_jax.kernels.{operation}"
    try:
        api = importlib.import_module(f"{module}.api")
    except ModuleNotFoundError as error:
        if error.name not in (module, f"{module}.api"):
            raise
        return ()
    return tuple(name for name in api.IMPLEMENTATIONS if name != "reference")


def our_sides(case: Case) -> list[Side]:
    """This project's implementations of a case's operation."""
    return [Side(name, ours(case, name), ours=True) for name in implementations(case.operation)]


def ours(case: Case, implementation: str) -> Call:
    """A case computed by one of our implementations."""
    operation = importlib.import_module(f"retro_jax.kernels.{case.operation}")

    def cca(arrays: Arrays, given: Given) -> jax.Array:
        assert isinstance(case, CcaCase)
        return operation.chunked_cross_attention(*arrays, given["valid"], chunk_len=case.chunk_len, implementation=implementation)

    def attention(arrays: Arrays, given: Given) -> jax.Array:
        mask = None
        if "lengths" in given:
            mask = operation.KeyMask(_before(given["lengths"], arrays[1].shape[1]))
        if "segments" in given:
            mask = operation.CausalMask(given["segments"], given["segments"])
        return operation.attention(*arrays, mask, implementation=implementation)

    def loss(arrays: Arrays, given: Given) -> jax.Array:
        return operation.weighted_loss(
            *arrays, given["targets"], given["weights"], chunk=LOSS_CHUNK, implementation=implementation
        )

    return {"chunked_cross_attention": cca, "attention": attention, "linear_cross_entropy": loss}[case.operation]


def rival_sides(case: Case, on_gpu: bool) -> list[Side]:
    """What else computes it here."""
    has_torch = importlib.util.find_spec("torch") is not None
    if isinstance(case, LossCase):
        sides = [Side("materialised logits", partial(materialised, logits=jnp.float32))]
        return [*sides, Side("torch cross_entropy", _torch("loss", case), library="torch")] if has_torch else sides
    sides = [Side("einsum", _of(case, partial(einsum, sums=jnp.float32)))]
    attend = jax.nn.dot_product_attention
    sides.append(Side("jax.nn xla", _of(case, partial(_dot_product, partial(attend, implementation="xla")))))
    if on_gpu:
        sides.append(Side("jax.nn cudnn", _of(case, partial(_dot_product, partial(attend, implementation="cudnn")))))
    if on_gpu and importlib.util.find_spec("tokamax") is not None:
        tokamax = importlib.import_module("tokamax")
        sides.append(Side("tokamax", _of(case, partial(_dot_product, tokamax.dot_product_attention))))
    if has_torch:
        sides.append(Side("torch sdpa", _torch("attention", case), library="torch"))
    return sides


def plain(case: Case) -> Call:
    """Every step in the inputs' dtype, as one would first write it: what the error of the others is held against."""
    if isinstance(case, LossCase):
        return partial(materialised, logits=None)
    return _of(case, partial(einsum, sums=None))


def exact(case: Case) -> Call:
    """The reference; float64 for float64 inputs."""
    return partial(materialised, logits=None) if isinstance(case, LossCase) else ours(case, "reference")


def materialised(arrays: Arrays, given: Given, *, logits: Any) -> jax.Array:
    """All logits at once, of dtype ``logits`` or the inputs'."""
    hidden_ND, table_VD = arrays
    logits_NV = jnp.einsum("nd,vd->nv", hidden_ND, table_VD, preferred_element_type=logits)
    logits_NV = logits_NV.astype(accumulation_dtype(logits_NV.dtype))
    target_N = jnp.take_along_axis(logits_NV, given["targets"][:, None], axis=1)[:, 0]
    losses_N = jax.nn.logsumexp(logits_NV, axis=1) - target_N
    return (losses_N * given["weights"].astype(losses_N.dtype)).sum()


def einsum(q_XQNH: jax.Array, k_XSGH: jax.Array, v_XSGH: jax.Array, case: Case, given: Given, *, sums: Any) -> jax.Array:
    """Two products and a softmax, head-major, differentiated by JAX; products summed in dtype ``sums`` or the inputs'."""
    X, Q, N, H = q_XQNH.shape
    G = k_XSGH.shape[2]
    q_XGPQH = q_XQNH.transpose(0, 2, 1, 3).reshape(X, G, N // G, Q, H)
    scores = jnp.einsum("xgpqh,xsgh->xgpqs", q_XGPQH, k_XSGH, preferred_element_type=sums)
    scores = scores * scores.dtype.type(H**-0.5)
    mask_XQS = dense(case, given)
    if mask_XQS is not None:
        scores = jnp.where(mask_XQS[:, None, None], scores, scores.dtype.type(-1e30))
    weights = jax.nn.softmax(scores, axis=-1).astype(v_XSGH.dtype)
    o = jnp.einsum("xgpqs,xsgh->xgpqh", weights, v_XSGH, preferred_element_type=sums).astype(q_XQNH.dtype)
    return o.reshape(X, N, Q, H).transpose(0, 2, 1, 3)


def dense(case: Case, given: Given) -> jax.Array | None:
    """bool [X, 1 or Q, S], or None where every query sees every key."""
    if isinstance(case, CcaCase):
        return given["valid"].reshape(-1, 1, case.keys) if case.absent else None
    assert isinstance(case, AttentionCase)
    if case.mask == "lengths":
        return _before(given["lengths"], case.keys)[:, None, :]
    if case.mask == "causal":
        place = jnp.arange(case.queries, dtype=jnp.int32)
        segments = given["segments"]
        return (place[:, None] >= place[None, :])[None] & (segments[:, :, None] == segments[:, None, :])
    return None


def _before(lengths_X: jax.Array, keys: int) -> jax.Array:
    return jnp.arange(keys, dtype=jnp.int32)[None, :] < lengths_X[:, None]


def _of(case: Case, attend: Callable[..., jax.Array]) -> Call:
    """Attention as the case's operation."""

    def call(arrays: Arrays, given: Given) -> jax.Array:
        q, k, v = arrays
        if not isinstance(case, CcaCase):
            return attend(q, k, v, case, given)
        (B, T, N, H), S, G, shift = q.shape, case.keys, case.groups, case.chunk_len - 1
        readers = jnp.pad(q[:, shift:], ((0, 0), (0, shift), (0, 0), (0, 0)))
        problems = readers.reshape(B * case.chunks, case.chunk_len, N, H)
        o = attend(problems, k.reshape(-1, S, G, H), v.reshape(-1, S, G, H), case, given).reshape(B, T, N, H)
        return jnp.pad(o[:, : T - shift], ((0, 0), (shift, 0), (0, 0), (0, 0)))

    return call


def _dot_product(attend: Callable[..., jax.Array], q: Any, k: Any, v: Any, case: Case, given: Given) -> jax.Array:
    """``jax.nn.dot_product_attention`` or one of its signature, told of the mask in the cheapest way that it knows."""
    if isinstance(case, AttentionCase) and case.mask == "lengths":
        full = jnp.full((case.problems,), case.queries, jnp.int32)
        return attend(q, k, v, query_seq_lengths=full, key_value_seq_lengths=given["lengths"])
    if isinstance(case, AttentionCase) and case.mask == "causal" and case.segments == 1:
        return attend(q, k, v, is_causal=True)
    mask = dense(case, given)
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None], (mask.shape[0], 1, q.shape[1], mask.shape[2]))
    return attend(q, k, v, mask=mask)


def _torch(name: str, case: Case) -> Call:
    """PyTorch's, imported when it is asked for."""
    return importlib.import_module("benchmarks.torch_rivals").CALLS[name](case)
