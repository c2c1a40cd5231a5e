"""The published layer: what its program keeps is the published formula, and its five forms compute the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from benchmarks.paper_layer import FORMS, RATE, SPECS, LayerParameters, causal_softmax, divided, gradients, layer, shapes
from benchmarks.recomputation import counted
from retro_jax.kernels.dropout import kept
from retro_jax.planning.paper import MODELS, PaperModel
from retro_jax.planning.program import collectives
from tests.planning.traced import exchanged

SMALL = PaperModel(heads=8, width=64, layers=1, microbatch=2, batch=2, seq_len=16, vocab=64)
Arrays = tuple[jax.Array, jax.Array, LayerParameters, jax.Array, jax.Array]


@pytest.mark.parametrize("name", MODELS)
def test_the_program_keeps_what_the_formula_says(name: str) -> None:
    """Exactly; and of products it computes again the scores alone, or all of the forward pass but its last product."""
    model = MODELS[name]
    s, h, t = model.seq_len, model.width, model.tensor
    unit, core = model.sbh // t, 5 * model.heads * s**2 * model.microbatch // t
    figures = counted(model)
    by_hand = {
        "tensor": unit * (10 * t + 24) + core, "tensor + selective": unit * (10 * t + 24),
        "tensor + sequence": unit * 34 + core, "tensor + sequence + selective": unit * 34, "full": 2 * model.sbh,
    }  # fmt: skip
    assert {form: row["program_bytes"] for form, row in figures.items()} == by_hand
    assert {form: row["formula_bytes"] for form, row in figures.items()} == by_hand
    both = figures["tensor + sequence + selective"]["percent_of_tensor_alone"]
    assert both == {"22B": 16.1, "175B": 18.5, "530B": 20.2, "1T": 20.2}[name]
    rows, layers = model.batch, model.layers
    own = figures["tensor"]["paper_flops"]
    again = {form: row["program_flops"] - own for form, row in figures.items()}
    scores, forward = 2 * rows * layers * s**2 * h, rows * layers * (24 * s * h**2 + 4 * s**2 * h)
    assert again == {
        "tensor": 0, "tensor + sequence": 0, "tensor + selective": scores, "tensor + sequence + selective": scores,
        "full": forward - 8 * rows * layers * s * h**2,
    }  # fmt: skip
    assert figures["tensor + selective"]["computed_again_percent"] < 1.0


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    random = np.random.default_rng(0)
    drawn = [jnp.asarray(0.3 * random.standard_normal(leaf.shape), jnp.float32) for leaf in shapes(SMALL)]
    shape = (SMALL.microbatch, SMALL.seq_len, SMALL.width)
    x_BTD, d_BTD = (jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(2))
    numbers_BT = jnp.arange(SMALL.microbatch * SMALL.seq_len, dtype=jnp.uint32).reshape(shape[:2])
    return x_BTD, d_BTD, LayerParameters(*drawn), jax.random.key(0), numbers_BT


def plain(x_BTD: jax.Array, p: LayerParameters, key: jax.Array, numbers_BT: jax.Array) -> jax.Array:
    """The layer by its definition, undivided."""
    T, D = x_BTD.shape[1:]
    N, H = p.out_NHD.shape[:2]

    def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale[None, None] + bias[None, None]

    def dropped(x: jax.Array, part: int) -> jax.Array:
        return jnp.where(kept(jax.random.fold_in(key, part), RATE, numbers_BT, D), x / (1 - RATE), 0.0)

    qkv = jnp.einsum("btd,dcnh->cbtnh", norm(x_BTD, p.first_scale_D, p.first_bias_D), p.qkv_D3NH)
    q, k, v = qkv + p.qkv_bias_3NH[:, None, None]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(H)
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool))[None, None], scores, -jnp.inf), axis=-1)
    numbers_BNT = numbers_BT[:, None, :] * jnp.uint32(N) + jnp.arange(N, dtype=jnp.uint32)[None, :, None]
    keep = kept(jax.random.fold_in(key, 0), RATE, numbers_BNT, T)
    o = jnp.einsum("bnts,bsnh->btnh", jnp.where(keep, weights / (1 - RATE), 0.0), v)
    x_BTD = x_BTD + dropped(jnp.einsum("btnh,nhd->btd", o, p.out_NHD) + p.out_bias_D[None, None], 1)
    up = jnp.einsum("btd,df->btf", norm(x_BTD, p.second_scale_D, p.second_bias_D), p.up_DF) + p.up_bias_F[None, None]
    down = jnp.einsum("btf,fd->btd", jax.nn.gelu(up, approximate=False), p.down_FD) + p.down_bias_D[None, None]
    return x_BTD + dropped(down, 2)


@pytest.fixture(scope="module")
def expected(arrays: Arrays) -> list[np.ndarray]:
    x_BTD, d_BTD, p, key, numbers_BT = arrays
    after, pull = jax.vjp(lambda x, p: plain(x, p, key, numbers_BT), x_BTD, p)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((after, *pull(d_BTD)))]


def eight_devices() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "tensor" else []) for name in FORMS])
def test_the_forms_compute_the_same(name: str, arrays: Arrays, expected: list[np.ndarray]) -> None:
    """The stream and every gradient, on 8 devices and on one, are those of the plain layer."""
    form = FORMS[name]
    alone = jax.jit(lambda *arrays: gradients(*arrays, form=form))(*arrays)
    for result in (jax.jit(divided(gradients, form, eight_devices()))(*arrays), alone):
        leaves = jax.tree.leaves(result)
        assert len(leaves) == len(expected) == 2 + len(SPECS)
        for got, want in zip(leaves, expected, strict=True):
            assert np.linalg.norm(np.asarray(got) - want) < 3e-6 * np.linalg.norm(want)  # measured 5e-7


def test_what_is_dropped_matters(arrays: Arrays, expected: list[np.ndarray]) -> None:
    x_BTD, _, p, _, numbers_BT = arrays
    other = layer(x_BTD, p, jax.random.key(1), numbers_BT, FORMS["tensor"])
    assert np.abs(np.asarray(other) - expected[0]).max() > 0.1


@pytest.mark.parametrize(
    ("name", "exchanges"),
    [
        ("tensor", {"psum": 4}),
        ("tensor + sequence", {"all_gather": 6, "reduce_scatter": 4}),
        ("tensor + sequence + selective", {"all_gather": 6, "reduce_scatter": 4}),
        ("full", {"psum": 5}),
    ],
)
def test_what_devices_send(name: str, exchanges: dict[str, int], arrays: Arrays) -> None:
    """Two all-reduces forward and two backward, or as many gathers and sums into shares and 2 gathers more, of what was not
    kept. "full" sums attention's output once more."""
    form = FORMS[name]
    found = collectives(jax.make_jaxpr(divided(gradients, form, eight_devices()))(*arrays))
    of_parameters = exchanged([e for e in found if e.operation == "psum" and form.sequence], None)
    assert exchanged(found, None) - of_parameters == exchanges


def test_the_softmax_is_causal_and_keeps_its_result() -> None:
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 5, 5)), jnp.float32)
    masked = jnp.where(jnp.tril(jnp.ones((5, 5), bool))[None, None], scores * 0.5, -jnp.inf)
    np.testing.assert_allclose(causal_softmax(scores, 0.5), jax.nn.softmax(masked, axis=-1), atol=1e-6)
    (kept_array,) = jax.tree.leaves(jax.vjp(lambda scores: causal_softmax(scores, 0.5), scores)[1])
    np.testing.assert_array_equal(kept_array, causal_softmax(scores, 0.5))
