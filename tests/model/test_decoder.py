"""Depth by repeating groups: the cut into runs, and the scan against a loop over layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.config import ModelConfig
from retro_jax.model.attention import causal_mask
from retro_jax.model.decoder import Row, runs
from tests.model.build import gpt, randomised, small

GPT, CCA = False, True


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (12, [((GPT,), 5), ((CCA,), 1), ((GPT, GPT, CCA), 2)]),
        (15, [((GPT,), 5), ((CCA,), 1), ((GPT, GPT, CCA), 3)]),
        (16, [((GPT,), 8), ((CCA,), 1), ((GPT, GPT, CCA), 2), ((GPT,), 1)]),
        (24, [((GPT,), 8), ((CCA,), 1), ((GPT, GPT, CCA), 5)]),
        (32, [((GPT,), 8), ((CCA,), 1), ((GPT, GPT, CCA), 7), ((GPT, GPT), 1)]),
        (40, [((GPT,), 8), ((CCA,), 1), ((GPT, GPT, CCA), 10), ((GPT,), 1)]),
        (48, [((GPT,), 8), ((CCA,), 1), ((GPT, GPT, CCA), 13)]),
    ],
)
def test_published_layer_counts(num_layers, expected):
    assert runs(num_layers, ModelConfig(num_layers=num_layers).cca_layers) == expected


def test_small_and_plain_models():
    assert runs(4, (2, 4)) == [((GPT,), 1), ((CCA,), 1), ((GPT,), 1), ((CCA,), 1)]
    assert runs(1, (1,)) == [((CCA,), 1)]
    assert runs(6, ()) == [((GPT,), 6)]
    assert runs(6, (1, 2, 3, 4, 5, 6)) == [((CCA,), 1), ((CCA,), 5)]


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n)))))
def test_runs_are_the_layers_in_order(case):
    num_layers, cca = case
    cut = runs(num_layers, tuple(sorted(cca)))
    kinds = [kind for pattern, count in cut for kind in pattern * count]
    assert kinds == [i in cca for i in range(1, num_layers + 1)]
    assert len(cut) <= 4 and all(count >= 1 and pattern for pattern, count in cut)
    if cca:
        first = next(i for i, (pattern, _) in enumerate(cut) if any(pattern))
        assert cut[first] == ((CCA,), 1)  # it runs the encoder


def test_the_scan_is_the_loop_over_layers():
    model = randomised(gpt(small(num_layers=3)))
    (stack,) = model.decoder
    assert stack.count == 3
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 6, 16)), jnp.float32)
    positions = jnp.asarray(np.tile(np.arange(6, dtype=np.int32), (2, 1)))
    row = Row(causal_mask(jnp.ones((2, 6), jnp.int32)), positions, jnp.arange(2, dtype=jnp.uint32))
    graph, state = nnx.split(stack.group)

    @jax.jit
    def scanned(state, x):
        return nnx.merge(nnx.split(stack)[0], nnx.State({"group": state}))(x, row, None, None)

    @jax.jit
    def looped(state, x):
        for i in range(3):
            x = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)).layers[0](x, row, None, None)
        return x

    np.testing.assert_allclose(scanned(state, x), looped(state, x), atol=1e-5)
    weights = jnp.asarray(random.standard_normal(x.shape), jnp.float32)
    ours, theirs = (jax.jit(jax.grad(lambda s, f=f: jnp.sum(f(s, x) * weights)))(state) for f in (scanned, looped))
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree_util.tree_leaves_with_path(theirs), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4, err_msg=jax.tree_util.keystr(path))
