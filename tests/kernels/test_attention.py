"""Attention: the XLA form against the reference, in values and in every gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.kernels.attention import CausalMask, KeyMask, Mask, attention, xla
from tests.kernels.tolerance import assert_as_good_as, widened

NAMES = ("q", "k", "v", "null")


def problem(seed: int, X: int, Q: int, S: int, N: int, G: int, H: int, *, mask: str, null: bool, dtype=np.float32) -> tuple:
    """q, k, v, null logit, mask and a cotangent of the output. Query 0 of problem 0 sees no key where there is a mask."""
    random = np.random.default_rng(seed)
    q, k, v, do = (random.standard_normal(shape) for shape in ((X, Q, N, H), (X, S, G, H), (X, S, G, H), (X, Q, N, H)))
    logit = random.standard_normal(N) if null else None
    who: Mask | None = None
    if mask == "key":
        valid_XS = random.random((X, S)) < 0.6
        valid_XS[0] = False
        who = KeyMask(valid_XS)
    if mask == "causal":
        first, end = max(0, S - Q), max(Q, S)
        segments = np.sort(random.integers(0, 3, (X, end)), axis=1).astype(np.int32)
        segments[0, : first + 1] = 0
        who = CausalMask(segments[:, first : first + Q], segments[:, :S], np.int32(first))
    arrays = tuple(None if a is None else jnp.asarray(a, dtype) for a in (q, k, v, logit))
    return arrays, who, jnp.asarray(do, dtype)


def value_and_gradients(arrays, mask, do, implementation, *, dropout=0.0, dropout_key=None):
    return _value_and_gradients(arrays, mask, do, dropout_key, implementation, dropout)


@partial(jax.jit, static_argnums=(4, 5))
def _value_and_gradients(arrays, mask, do, key, implementation, dropout):
    def run(q, k, v, null):
        return attention(q, k, v, mask, null, implementation=implementation, dropout=dropout, dropout_key=key)

    o, vjp = jax.vjp(run, *arrays)
    return o, vjp(do)


@pytest.mark.parametrize(
    ("groups", "mask", "null", "sizes"),
    [
        (4, "none", False, (7, 5)),
        (2, "causal", True, (7, 5)),
        (1, "key", True, (7, 5)),
        (2, "key", False, (7, 5)),
        (4, "causal", False, (7, 5)),
        (1, "none", True, (7, 5)),
        (2, "causal", True, (100, 90)),  # 2 heads a group: 200 x 90 weights, from TURNED_FROM on
    ],
)
def test_xla_is_the_reference_in_float64(groups, mask, null, sizes):
    with jax.enable_x64(True):
        arrays, who, do = problem(0, 3, *sizes, 4, groups, 6, mask=mask, null=null, dtype=np.float64)
        o, gradients = value_and_gradients(arrays, who, do, "xla")
        o_reference, gradients_reference = value_and_gradients(arrays, who, do, "reference")
        assert o.dtype == jnp.float64
        np.testing.assert_allclose(o, o_reference, atol=1e-13)  # measured 4e-16
        for name, ours, reference in zip(NAMES, gradients, gradients_reference, strict=True):
            if reference is not None:
                np.testing.assert_allclose(ours, reference, atol=1e-12, err_msg=name)  # measured 2e-15


@pytest.mark.parametrize("start", ["first key", "later"])
@pytest.mark.parametrize(("length", "dropout"), [(37, 0.0), (37, 0.3), (16, 0.0), (3, 0.0)])
def test_blocks_of_queries_make_the_whole(monkeypatch, start, length, dropout):
    """Of 4 queries: 9 blocks in 3 pieces and one query more; 4 pieces of a block; one short block."""
    monkeypatch.setattr(xla, "CPU_BLOCK", 4)
    with jax.enable_x64(True):
        arrays, mask, do = problem(8, 2, length, length, 4, 2, 6, mask="causal", null=length == 16, dtype=np.float64)
        mask = mask._replace(first=None if start == "first key" else np.int32(0))
        keywords = {"dropout": dropout, "dropout_key": jax.random.key(0)} if dropout else {}
        jax.clear_caches()  # they know nothing of the block
        o, gradients = value_and_gradients(arrays, mask, do, "xla", **keywords)
        o_reference, gradients_reference = value_and_gradients(arrays, mask, do, "reference", **keywords)
        np.testing.assert_allclose(o, o_reference, atol=1e-13)  # measured 4e-16
        for name, ours, reference in zip(NAMES, gradients, gradients_reference, strict=True):
            if reference is not None:
                np.testing.assert_allclose(ours, reference, atol=1e-12, err_msg=name)  # measured 4e-15


@pytest.mark.parametrize("start", ["first key", "later"])
def test_memory_grows_with_the_length_not_with_its_square(start):
    """Forward and backward: measured 2.0 from 2,048 to 4,096 tokens, and a sixth of what the weights alone would take."""

    def temporary(length: int) -> int:
        def run(q, k, v, segments, do):
            mask = CausalMask(segments, segments, None if start == "first key" else segments[0, 0])
            return jax.vjp(lambda *arrays: attention(*arrays, mask, implementation="xla"), q, k, v)[1](do)

        rows, segments = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in
                          (((1, length, 4, 16), jnp.float32), ((1, length), jnp.int32)))  # fmt: skip
        compiled = jax.jit(run).lower(rows, rows, rows, segments, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.2 * temporary(2048)
    assert temporary(4096) < 4 * 4096**2 * 4 / 6


@given(
    X=st.integers(1, 3), Q=st.integers(1, 9), S=st.integers(1, 9), G=st.integers(1, 3), group=st.integers(1, 3),
    H=st.integers(1, 5), mask=st.sampled_from(["none", "causal", "key"]), null=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=3, deadline=None)
def test_xla_is_the_reference_for_every_shape(X, Q, S, G, group, H, mask, null, seed):
    arrays, who, do = problem(seed, X, Q, S, G * group, G, H, mask=mask, null=null)
    o, gradients = value_and_gradients(arrays, who, do, "xla")
    o_reference, gradients_reference = value_and_gradients(arrays, who, do, "reference")
    np.testing.assert_allclose(o, o_reference, atol=2e-6)
    for name, ours, reference in zip(NAMES, gradients, gradients_reference, strict=True):
        if reference is not None:
            np.testing.assert_allclose(ours, reference, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("null", [False, True])
def test_error_is_within_that_of_the_same_dtype(dtype, null):
    """At most 2 x (forward) and 3 x (backward) the error of a plain computation in the dtype itself."""
    arrays, mask, do = problem(1, 4, 64, 96, 4, 2, 32, mask="causal", null=null, dtype=dtype)
    ours = value_and_gradients(arrays, mask, do, "xla")
    assert ours[0].dtype == dtype
    with jax.enable_x64(True):
        wide = widened((*arrays, do))
        exact = value_and_gradients(wide[:4], mask, wide[4], "reference")
    plain = jax.jit(plain_value_and_gradients)(arrays, mask, do)
    assert_as_good_as(ours[0], plain[0], exact[0], factor=2.0, name="o")
    for name, a, b, c in zip(NAMES, ours[1], plain[1], exact[1], strict=True):
        if a is not None:
            assert a.dtype == dtype
            assert_as_good_as(a, b, c, factor=3.0, name=name)


def plain_value_and_gradients(arrays, mask, do):
    o, vjp = jax.vjp(lambda q, k, v, null: plain_attention(q, k, v, mask, null), *arrays)
    return o, vjp(do)


def plain_attention(q, k, v, mask, null):
    """Attention as one would write it, every step in the inputs' dtype."""
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("xqnh,xsnh->xnqs", q, k) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    scores = jnp.where(mask.dense()[:, None], scores, jnp.asarray(-1e30, q.dtype))
    column = jnp.full((*scores.shape[:-1], 1), -1e30, q.dtype)
    if null is not None:
        column = jnp.broadcast_to(null[None, :, None, None], column.shape)
    weights = jax.nn.softmax(jnp.concatenate([scores, column], -1), axis=-1)[..., :-1]
    weights = jnp.where(mask.dense()[:, None], weights, jnp.zeros_like(weights))
    return jnp.einsum("xnqs,xsnh->xqnh", weights, v)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("null", [False, True])
def test_a_query_that_sees_nothing_gets_exactly_zero_and_gives_no_gradient(implementation, null):
    arrays, mask, do = problem(2, 3, 4, 5, 4, 2, 6, mask="causal", null=null)
    mask.segments_XQ[0], mask.key_segments_XS[0] = (0, 1, 1, 2), (1, 0, 1, 1, 2)
    mask.segments_XQ[1] = 0  # a whole problem without a key
    o, (dq, dk, dv, dnull) = value_and_gradients(arrays, mask, do, implementation)
    assert not np.any(o[0, 0]) and not np.any(o[1])
    assert not np.any(dq[0, 0]) and not np.any(dq[1]) and not np.any(dk[1]) and not np.any(dv[1])
    assert np.any(o[0, 1]) and np.any(dq[0, 1])
    for gradient in (dq, dk, dv, *([dnull] if null else [])):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_masked_keys_do_not_matter_at_all(implementation):
    (q, k, v, null), mask, do = problem(3, 2, 4, 5, 2, 2, 6, mask="key", null=True)
    o, (_, dk, dv, _) = value_and_gradients((q, k, v, null), mask, do, implementation)
    hidden = ~mask.valid_XS
    assert not np.any(np.asarray(dk)[hidden]) and not np.any(np.asarray(dv)[hidden])
    k, v = (
        jnp.asarray(np.where(hidden[..., None, None], wrong, a)) for a, wrong in ((k, np.float32(1e4)), (v, np.float32(-1e4)))
    )
    other = value_and_gradients((q, k, v, null), mask, do, implementation)[0]
    np.testing.assert_array_equal(o, other)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_null_logit_is_a_key_of_its_own_with_value_zero(implementation):
    (q, k, v, null), _, do = problem(4, 2, 4, 5, 3, 3, 6, mask="none", null=True)
    o, gradients = value_and_gradients((q, k, v, null), None, do, implementation)
    scores = np.einsum("xqnh,xsnh->xnqs", q, k) / np.sqrt(6)
    column = np.broadcast_to(np.asarray(null)[None, :, None, None], (*scores.shape[:-1], 1))
    weights = np.exp(np.concatenate([scores, column], -1))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(o, np.einsum("xnqs,xsnh->xqnh", weights[..., :-1], v), atol=1e-6)
    # d/dnull of softmax: -(weight of nothing) * (output . cotangent)
    expected = -(weights[..., -1] * np.einsum("xqnh,xqnh->xnq", o, do)).sum((0, 2))
    np.testing.assert_allclose(gradients[3], expected, atol=1e-5)


def test_scores_of_any_size_are_safe():
    (q, k, v, null), mask, do = problem(5, 2, 4, 5, 2, 2, 6, mask="causal", null=True)
    o, gradients = value_and_gradients((q * 1e4, k * 1e4, v, null), mask, do, "xla")
    assert np.isfinite(o).all() and all(np.isfinite(g).all() for g in gradients)


def test_dropout_is_the_same_in_both():
    arrays, mask, do = problem(6, 2, 6, 9, 4, 2, 8, mask="causal", null=True)
    keywords = {"dropout": 0.3, "dropout_key": jax.random.key(0)}
    o, gradients = value_and_gradients(arrays, mask, do, "xla", **keywords)
    o_reference, gradients_reference = value_and_gradients(arrays, mask, do, "reference", **keywords)
    np.testing.assert_allclose(o, o_reference, atol=2e-6)
    for name, ours, reference in zip(NAMES, gradients, gradients_reference, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5, err_msg=name)


def test_dropout_zeroes_its_share_of_the_weights_and_scales_the_rest():
    (q, k, _, _), _, do = problem(7, 2, 64, 32, 2, 2, 32, mask="none", null=False)
    v = jnp.broadcast_to(jnp.eye(32)[None, :, None], k.shape)  # the output is the weights
    weights = value_and_gradients((q, k, v, None), None, do, "xla")[0]
    dropped = value_and_gradients((q, k, v, None), None, do, "xla", dropout=0.3, dropout_key=jax.random.key(1))[0]
    zero = np.asarray(dropped) == 0.0
    assert abs(zero.mean() - 0.3) < 0.03  # 8,192 weights: a standard error is 0.005
    np.testing.assert_allclose(np.asarray(dropped)[~zero], np.asarray(weights)[~zero] / 0.7, rtol=1e-5)


def test_what_does_not_fit_is_named():
    (q, k, v, _), _, _ = problem(7, 2, 4, 5, 4, 2, 6, mask="none", null=False)
    with pytest.raises(ValueError, match=r"q \(2, 4, 4, 6\), k \(2, 5, 2, 5\)"):
        attention(q, k[..., :5], v)
    with pytest.raises(ValueError, match="N a multiple of G"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match=r"mask \(2, 4\) is not \[X, S\] = \(2, 5\)"):
        attention(q, k, v, KeyMask(np.ones((2, 4), bool)))
    with pytest.raises(ValueError, match=r"segments \(2, 5\) and \(2, 5\) are not \[X, Q\] = \(2, 4\)"):
        attention(q, k, v, CausalMask(np.ones((2, 5), np.int32), np.ones((2, 5), np.int32)))
    with pytest.raises(ValueError, match=r"dropout=0.1 needs a dropout_key"):
        attention(q, k, v, dropout=0.1)
    with pytest.raises(ValueError, match="implementation='flash' is not known; choose one of reference, xla, triton, cudnn"):
        attention(q, k, v, implementation="flash")
