"""Norms, rotary positions, activations, linear maps and convolutions against computations by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from retro_jax.model.attention import BlockShape, FeedForward, causal_mask
from retro_jax.model.cca import causal_convolution
from retro_jax.model.layers import Embedding, Linear, activate, dropout, normal, normalise, numbered, rotate
from tests.model.build import small

RANDOM = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["layernorm", "layernorm1p", "rmsnorm"])
def test_norms(kind):
    x, scale, bias = array(2, 3, 8) * 3 + 1, array(8), array(8)
    if kind == "rmsnorm":
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
    else:
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
        expected = expected * (scale + 1.0 if kind == "layernorm1p" else scale) + bias
    arrays = [jnp.asarray(a) for a in (x, scale)] + [None if kind == "rmsnorm" else jnp.asarray(bias)]
    np.testing.assert_allclose(normalise(*arrays, kind=kind, eps=1e-3), expected, atol=1e-5)
    narrow = normalise(*(None if a is None else a.astype(jnp.bfloat16) for a in arrays), kind=kind, eps=1e-3)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, np.float32), expected, atol=0.1)


@pytest.mark.parametrize("kind", ["layernorm", "layernorm1p", "rmsnorm"])
def test_gradients_of_norms_are_those_of_differences(kind):
    with jax.enable_x64(True):
        x, scale, do = (jnp.asarray(RANDOM.standard_normal(s)) for s in ((3, 8), (8,), (3, 8)))
        bias = None if kind == "rmsnorm" else jnp.asarray(RANDOM.standard_normal(8))
        args = (x, scale, bias) if bias is not None else (x, scale)

        def loss(*args):
            return jnp.sum(normalise(args[0], args[1], args[2] if len(args) > 2 else None, kind=kind, eps=1e-5) * do)

        check_grads(loss, args, order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("fraction", "scale", "base"), [(1.0, 1.0, 10_000.0), (0.5, 1.0, 10_000.0), (0.75, 4.0, 500.0)])
def test_rotary_turns_pairs_of_halves(fraction, scale, base):
    """Dims j and j + rotated/2 are one complex number, turned by position / scale * base^(-2j/rotated)."""
    x, positions = array(2, 5, 3, 8), RANDOM.integers(0, 100, (2, 5)).astype(np.int32)
    rotated = int(8 * fraction) // 2 * 2
    half = rotated // 2
    turns = np.exp(1j * positions[:, :, None, None] / scale * base ** (-2.0 * np.arange(half) / rotated))
    numbers = (x[..., :half] + 1j * x[..., half:rotated]) * turns
    expected = np.concatenate([numbers.real, numbers.imag, x[..., rotated:]], axis=-1)
    got = rotate(jnp.asarray(x), jnp.asarray(positions), fraction=fraction, base=base, scale=scale)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_rotated_products_depend_on_distance_alone():
    q, k = array(1, 1, 1, 8), array(1, 1, 1, 8)

    def product(i: int, j: int) -> float:
        a, b = (
            rotate(jnp.asarray(x), jnp.full((1, 1), p, jnp.int32), fraction=1.0, base=1e4, scale=1.0) for x, p in ((q, i), (k, j))
        )
        return float(jnp.sum(a * b))

    assert product(7, 3) == pytest.approx(product(27, 23), abs=1e-4)
    assert abs(product(7, 3) - product(8, 3)) > 1e-3


def test_linear_interpolation_is_a_shorter_position():
    x = jnp.asarray(array(1, 3, 2, 8))
    stretched = rotate(x, jnp.asarray([[0, 4, 8]]), fraction=1.0, base=1e4, scale=4.0)
    np.testing.assert_allclose(stretched, rotate(x, jnp.asarray([[0, 1, 2]]), fraction=1.0, base=1e4, scale=1.0), atol=1e-6)


def test_activations():
    x = np.linspace(-3, 3, 13).astype(np.float32)
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(activate(jnp.asarray(x), "gelu"), erf, atol=1e-6)
    np.testing.assert_allclose(activate(jnp.asarray(x), "gelu_tanh"), tanh, atol=1e-6)
    assert np.abs(erf - tanh).max() > 1e-4
    np.testing.assert_array_equal(activate(jnp.asarray(x), "relu"), np.maximum(x, 0))
    np.testing.assert_allclose(activate(jnp.asarray(x), "squared_relu"), np.maximum(x, 0) ** 2, atol=1e-6)
    gate, up = array(4, 5), array(4, 5)
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(activate(jnp.stack([gate, up], axis=-2), "swiglu"), expected, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "squared_relu", "swiglu"])
def test_gradients_of_the_feed_forward_block_are_those_of_differences(activation):
    shape = BlockShape.of_decoder(small(activation=activation))
    with jax.enable_x64(True):
        graph, state = nnx.split(nnx.eval_shape(lambda: FeedForward(shape, key=jax.random.key(0))))
        state = jax.tree.map(lambda p: jnp.asarray(0.3 * RANDOM.standard_normal(p.shape)), state)
        x = jnp.asarray(RANDOM.standard_normal((2, 3, 16)))
        check = jax.jit(lambda s, x: jnp.sum(nnx.merge(graph, s)(x, None) ** 2))
        check_grads(check, (state, x), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)


def test_linear_over_several_dims():
    layer = Linear("heads head_dim width", (2, 3), (4,), bias=True, init=normal(1.0), key=jax.random.key(0))
    layer.bias[...] = jnp.arange(4.0)
    x = array(5, 2, 3)
    expected = x.reshape(5, 6) @ np.asarray(layer.weight[...]).reshape(6, 4) + np.arange(4)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-5)
    assert layer.weight.dims == ("heads", "head_dim", "width") and layer.bias.dims == ("width",)


def test_embedding_takes_rows():
    table = Embedding("vocab width", 7, 3, init=normal(1.0), key=jax.random.key(0))
    ids = np.array([[6, 0], [3, 3]], np.int32)
    np.testing.assert_array_equal(table(jnp.asarray(ids)), np.asarray(table.table[...])[ids])


def test_dropout_keeps_its_share_and_the_mean():
    x = jnp.ones((100, 100))
    noise = numbered(jax.random.key(0), jnp.arange(100, dtype=jnp.uint32)[None])
    assert dropout(x, 0.25, None) is x and dropout(x, 0.0, noise) is x
    dropped = np.asarray(dropout(x[None], 0.25, noise))[0]
    assert set(np.unique(dropped)) == {np.float32(0.0), np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 0.02


def test_causal_mask_by_loop():
    segments = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 0, 0, 0, 0]], np.int32)
    got = np.asarray(causal_mask(jnp.asarray(segments)).dense())
    for b in range(2):
        for i in range(7):
            for j in range(7):
                assert got[b, i, j] == (j <= i and segments[b, i] == segments[b, j] > 0)


@pytest.mark.parametrize("cut", [0, 1, 2, 4])
def test_causal_convolution_by_loop(cut):
    """Rows convolved in two parts, the second given the tokens before it."""
    x, taps = array(2, 6, 3), array(3, 3)
    segments = np.array([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 0, 0]], np.int32)

    def part(given, here, before):
        pair = None if given is None else (jnp.asarray(given[:, here]), jnp.asarray(given[:, before]))
        return causal_convolution(jnp.asarray(x[:, here]), jnp.asarray(taps), jnp.asarray(x[:, before]), pair)

    for given in (None, segments):
        first, second = part(given, slice(0, cut), slice(0, 0)), part(given, slice(cut, 6), slice(max(0, cut - 2), cut))
        got = np.concatenate([first, second], axis=1)
        expected = np.zeros_like(x)
        for b in range(2):
            for t in range(6):
                for w in range(min(3, t + 1)):
                    if given is None or given[b, t] == given[b, t - w]:
                        expected[b, t] += taps[w] * x[b, t - w]
        np.testing.assert_allclose(got, expected, atol=1e-5)
