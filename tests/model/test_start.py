"""How a model starts, and the names, shapes and dims of its parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.model import Retro
from tests.model.build import fresh, gpt, small

COPY, TAPS, D = 0.7, 3, 16


@pytest.fixture(scope="module")
def model() -> Retro:
    copy = {"cca_init": "copy", "copy_strength": COPY, "conv_width": TAPS}
    return fresh(small(num_layers=4, norm="layernorm1p", retro={"cca_layers": (2,), "gate": "learned", "null_key": 2.5, **copy}))


def leaves(model: Retro, *endings: str) -> list[np.ndarray]:
    return [np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.split(model)[1]) if path[-1] in endings]


def test_norms_gates_null_keys_and_biases(model):
    assert all(np.all(a == 0.0) for a in leaves(model, "scale"))  # layernorm1p: the difference from 1
    assert all(np.all(a == 0.0) for a in leaves(model, "bias"))
    assert [a.tolist() for a in leaves(model, "null_logit")] == [[[2.5] * 2]]
    assert [a.tolist() for a in leaves(model, "gate")] == [[1.0]]
    assert all(a.dtype == np.float32 for a in jax.tree.leaves(nnx.split(model)[1]))


def test_layers_start_apart_with_the_stated_spread(model):
    stack = model.decoder[2]  # the two layers after the one with CCA
    weight = np.asarray(stack.group.layers[0].ffn.up.weight[...])
    assert weight.shape == (2, D, 24) and np.abs(weight[0] - weight[1]).max() > 0.01
    assert weight.std() == pytest.approx(0.02, rel=0.1)  # init_std
    assert np.asarray(stack.group.layers[0].ffn.down.weight[...]).std() == pytest.approx(
        0.02 / 8**0.5, rel=0.1
    )  # / sqrt(2 x layers)
    assert np.asarray(model.embedding.table[...]).std() == pytest.approx(0.02, rel=0.1)


def test_copy_start(model):
    cca = model.decoder[1].group.layers[0].cca
    query, (keys, values), out = cca.query.weight[0], jnp.moveaxis(cca.key_value.weight[0], 1, 0), cca.out.weight[0]
    np.testing.assert_array_equal(query, keys)
    np.testing.assert_allclose(query.reshape(D, D) @ query.reshape(D, D).T, np.eye(D), atol=1e-5)
    np.testing.assert_allclose(values.reshape(D, D) @ out.reshape(D, D), COPY * np.eye(D), atol=1e-5)
    # A key carries the tokens before its own as a query carries its own and those before, with falling taps of length 1.
    np.testing.assert_allclose(cca.query_conv[0, :, 0], np.array([4, 2, 1]) / 21**0.5, rtol=1e-6)
    np.testing.assert_allclose(cca.key_conv[0, :, 0], np.array([0, 2, 1]) / 5**0.5, rtol=1e-6)
    assert np.all(cca.key_conv[0] == cca.key_conv[0][:, :1]) and np.all(cca.query_conv[0] == cca.query_conv[0][:, :1])


@pytest.mark.parametrize("form", ["retro", "gpt"])
def test_parameter_tree(golden, form):
    """`make goldens` writes the file anew; a changed line is a changed checkpoint format."""
    if form == "retro":
        retro = {"cca_layers": (2, 4), "gate": "learned", "null_key": 2.5, "conv_width": 2}
        config = small(num_layers=5, positions="learned", activation="swiglu", retro=retro, encoder={"num_layers": 2})
    else:
        config = gpt(small(num_layers=3, norm="rmsnorm", linear_bias=False, num_kv_heads=1, tied_embedding=False))
    state = nnx.split(nnx.eval_shape(lambda: Retro(config, key=jax.random.key(0))))[1]
    lines = [f"{'.'.join(map(str, path))} {list(v.shape)} {' '.join(v.dims)}" for path, v in nnx.to_flat_state(state)]
    golden(f"parameters/{form}.txt", "\n".join(lines) + "\n")
