"""Chunked cross-attention: both implementations against a loop written from the definition, and against each other."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.kernels.chunked_cross_attention import chunked_cross_attention
from tests.kernels.tolerance import assert_as_good_as, widened

NAMES = ("q", "k", "v", "null")


def problem(seed, B, T, L, S, N, G, H, *, null=False, dtype=np.float32):
    """q, k, v, null logit, key mask and a cotangent. Chunk 0 of row 0 has no valid key."""
    random = np.random.default_rng(seed)
    q, k, v, do = (random.standard_normal(shape) for shape in ((B, T, N, H), (B, L, S, G, H), (B, L, S, G, H), (B, T, N, H)))
    mask = random.random((B, L, S)) < 0.7
    mask[0, 0] = False
    logit = jnp.asarray(random.standard_normal(N), dtype) if null else None
    return (*(jnp.asarray(a, dtype) for a in (q, k, v)), logit), mask, jnp.asarray(do, dtype)


@partial(jax.jit, static_argnums=(4, 5))
def value_and_gradients(arrays, mask, first, do, chunk_len, implementation):
    keywords = {"chunk_len": chunk_len, "first_chunk_len": first, "implementation": implementation}
    o, vjp = jax.vjp(lambda q, k, v, null: chunked_cross_attention(q, k, v, mask, null, **keywords), *arrays)
    return o, vjp(do)


def by_definition(arrays, mask, first_B, chunk_len):
    """Token i of a row reads chunk floor((i - f + 1) / C), softmax over its valid keys; everything else gives 0."""
    q, k, v, null = (None if a is None else np.asarray(a, np.float64) for a in arrays)
    B, T, N, H = q.shape
    L, G = k.shape[1], k.shape[3]
    o = np.zeros((B, T, N, H))
    for b in range(B):
        for i in range(T):
            chunk = (i - int(first_B[b]) + 1) // chunk_len  # Python floors
            if not 0 <= chunk < L or not mask[b, chunk].any():
                continue
            valid = mask[b, chunk]
            for n in range(N):
                g = n // (N // G)
                scores = k[b, chunk][valid, g] @ q[b, i, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                total = weights.sum() + (0.0 if null is None else np.exp(null[n] - scores.max()))
                o[b, i, n] = weights @ v[b, chunk][valid, g] / total
    return o


def check(arrays, mask, first, do, chunk_len):
    B = mask.shape[0]
    expected = by_definition(arrays, mask, np.full(B, chunk_len) if first is None else first, chunk_len)
    results = {name: value_and_gradients(arrays, mask, first, do, chunk_len, name) for name in ("reference", "xla")}
    for name, (o, _) in results.items():
        np.testing.assert_allclose(o, expected, atol=2e-6, err_msg=name)
        assert not np.any(np.asarray(o)[expected == 0.0]), name
    for name, ours, reference in zip(NAMES, results["xla"][1], results["reference"][1], strict=True):
        if reference is not None:
            np.testing.assert_allclose(ours, reference, atol=2e-5, err_msg=name)
    return results


@pytest.mark.parametrize(("groups", "null"), [(4, False), (2, True), (1, False)])
def test_rows_on_the_grid(groups, null):
    arrays, mask, do = problem(0, 2, 12, 3, 5, 4, groups, 6, null=null)
    check(arrays, mask, None, do, 4)


@pytest.mark.parametrize("length", [4, 11, 13])
def test_every_first_chunk_length(length):
    """C = 4 and rows with f = 1, 2, 3, 4: T on the grid of some, beyond the last chunk of others, shorter than f for none."""
    first = np.array([1, 2, 3, 4], np.int32)
    arrays, mask, do = problem(1, 4, length, 3, 3, 2, 1, 4, null=True)
    check(arrays, mask, first, do, 4)


def test_a_first_chunk_of_full_length_is_the_aligned_row():
    arrays, mask, do = problem(2, 2, 12, 3, 5, 2, 2, 6)
    aligned = value_and_gradients(arrays, mask, None, do, 4, "xla")
    given_ = value_and_gradients(arrays, mask, np.full(2, 4, np.int32), do, 4, "xla")
    np.testing.assert_array_equal(aligned[0], given_[0])
    for a, b in zip(aligned[1][:3], given_[1][:3], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_row_in_parts_reads_the_chunk_before_each(implementation, parts):
    """With first_chunk_len 0 chunk 0 is the last one of the part before; the first part's has no valid key."""
    L, C, S = 6, 4, 5
    (q, k, v, null), mask, _ = problem(8, 2, L * C, L, S, 4, 2, 6, null=True)
    whole = chunked_cross_attention(q, k, v, mask, null, chunk_len=C, implementation=implementation)
    k, v, mask = (jnp.concatenate([jnp.zeros_like(a[:, :1]), a], axis=1) for a in (k, v, jnp.asarray(mask)))
    count = L // parts
    for start in range(0, L, count):
        chunks, tokens = slice(start, start + count + 1), slice(start * C, (start + count) * C)
        keywords = {"chunk_len": C, "first_chunk_len": 0, "implementation": implementation}
        part = chunked_cross_attention(q[:, tokens], k[:, chunks], v[:, chunks], mask[:, chunks], null, **keywords)
        np.testing.assert_allclose(part, whole[:, tokens], atol=1e-6)


@given(
    B=st.integers(1, 3), T=st.integers(1, 14), C=st.integers(1, 5), S=st.integers(1, 4), G=st.integers(1, 2),
    group=st.integers(1, 2), null=st.booleans(), seed=st.integers(0, 2**16), data=st.data(),
)  # fmt: skip
@settings(max_examples=3, deadline=None)
def test_any_shape(B, T, C, S, G, group, null, seed, data):
    first = np.array(data.draw(st.lists(st.integers(1, C), min_size=B, max_size=B)), np.int32)
    L = data.draw(st.integers(1, max(1, -(-T // C) + 1)))
    arrays, mask, do = problem(seed, B, T, L, S, G * group, G, 4, null=null)
    check(arrays, mask, first, do, C)


@pytest.mark.slow
@given(
    B=st.integers(1, 4), T=st.integers(1, 40), C=st.integers(1, 9), S=st.integers(1, 12), G=st.integers(1, 3),
    group=st.integers(1, 3), null=st.booleans(), seed=st.integers(0, 2**16), data=st.data(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_any_larger_shape(B, T, C, S, G, group, null, seed, data):
    test_any_shape.hypothesis.inner_test(B, T, C, S, G, group, null, seed, data)


def test_float64_gradients_are_the_references_to_rounding():
    with jax.enable_x64(True):
        arrays, mask, do = problem(3, 2, 11, 3, 5, 4, 2, 6, null=True, dtype=np.float64)
        first = np.array([3, 2], np.int32)
        ours, reference = (value_and_gradients(arrays, mask, first, do, 4, name) for name in ("xla", "reference"))
        np.testing.assert_allclose(ours[0], reference[0], atol=1e-13)  # measured 4e-16
        for name, a, b in zip(NAMES, ours[1], reference[1], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12, err_msg=name)  # measured 2e-15


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_is_within_that_of_the_same_dtype(dtype):
    """At most 2 x (forward) and 3 x (backward) the error of plain attention in the dtype itself."""
    B, L, C, S, N, H = 2, 4, 16, 64, 2, 32
    arrays, mask, do = problem(4, B, L * C, L, S, N, N, H, dtype=dtype)
    ours = value_and_gradients(arrays, mask, None, do, C, "xla")
    plain = jax.jit(partial(plain_value_and_gradients, mask=mask, chunk_len=C))(arrays[:3], do)
    with jax.enable_x64(True):
        wide = widened((*arrays, do))
        exact = value_and_gradients(wide[:4], mask, None, wide[4], C, "reference")
    assert ours[0].dtype == dtype
    assert_as_good_as(ours[0], plain[0], exact[0], factor=2.0, name="o")
    for name, a, b, c in zip(NAMES[:3], ours[1], plain[1], exact[1][:3], strict=False):
        assert_as_good_as(a, b, c, factor=3.0, name=name)


def plain_value_and_gradients(arrays, do, *, mask, chunk_len):
    def run(q, k, v):
        B, T, N, H = q.shape
        L = k.shape[1]
        moved = jnp.pad(q[:, chunk_len - 1 :], ((0, 0), (0, chunk_len - 1), (0, 0), (0, 0))).reshape(B, L, chunk_len, N, H)
        scores = jnp.einsum("blqnh,blsnh->blnqs", moved, k) * jnp.asarray(H**-0.5, q.dtype)
        valid = jnp.asarray(mask)[:, :, None, None]
        weights = jax.nn.softmax(jnp.where(valid, scores, jnp.asarray(-1e30, q.dtype)), axis=-1)
        o = jnp.einsum("blnqs,blsnh->blqnh", jnp.where(valid, weights, jnp.zeros_like(weights)), v).reshape(B, T, N, H)
        return jnp.pad(o, ((0, 0), (chunk_len - 1, 0), (0, 0), (0, 0)))[:, :T]

    o, vjp = jax.vjp(run, *arrays)
    return o, vjp(do)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_is_not_read_has_exactly_no_gradient(implementation):
    """f = 3, C = 4: tokens 0 and 1 read nothing, token 2 is the first reader of chunk 0; chunk 3 has no reader in 11 tokens."""
    arrays, mask, do = problem(5, 1, 11, 4, 3, 2, 2, 4)
    mask[:] = True
    o, (dq, dk, dv, _) = value_and_gradients(arrays, mask, np.array([3], np.int32), do, 4, implementation)
    assert not np.any(o[0, :2]) and not np.any(dq[0, :2])
    assert np.all(np.any(o[0, 2:], axis=(1, 2)))
    assert not np.any(dk[0, 3]) and not np.any(dv[0, 3])
    assert np.all(np.any(dv[0, :3], axis=(1, 2, 3)))


def test_what_does_not_fit_is_named():
    (q, k, v, _), mask, _ = problem(6, 2, 12, 3, 5, 2, 2, 6)
    with pytest.raises(ValueError, match="12 tokens are not 3 chunks of 5; give first_chunk_len"):
        chunked_cross_attention(q, k, v, mask, chunk_len=5)
    with pytest.raises(ValueError, match=r"mask \(2, 3, 4\) do not fit"):
        chunked_cross_attention(q, k, v, mask[..., :4], chunk_len=4)
    with pytest.raises(ValueError, match="implementation='triton_' is not known"):
        chunked_cross_attention(q, k, v, mask, chunk_len=4, implementation="triton_")
