"""Chunks that are read, packed into places: the indices against loops, the model against the model that packs nothing."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

from retro_jax.data.batch import Batch
from retro_jax.model.grid import chunks_read, reads
from retro_jax.model.packing import places_of, readers_of
from tests.model.build import C, randomised, rows, small

# Two documents, each ending inside a chunk; and one that ends with a chunk.
SEGMENTS = [[1] * 11 + [0] + [2] * 7 + [0] + [3] * 4, [1] * 8 + [2] * 13 + [0] * 3]


def three_rows(seed: int = 0) -> Batch:
    return rows(seed, B=2, T=24, L=6, segments=SEGMENTS)


def loss_and_gradients(model: Any, batch: Batch, places: int | None, dropout_key: Any = None) -> tuple[jax.Array, Any]:
    """Of a sum of the hidden states with random weights."""
    graph, state = nnx.split(model)
    shape = (*batch.tokens.shape, model.config.width)
    weights = np.random.default_rng(7).standard_normal(shape).astype(np.float32)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def compute(state: Any) -> tuple[jax.Array, Any]:
        def loss(state: Any) -> jax.Array:
            return jnp.sum(nnx.merge(graph, state)(batch, places=places, dropout_key=dropout_key) * weights)

        return jax.value_and_grad(loss)(state)

    return compute(state)


# Few shapes: each is compiled, operation by operation.
SHAPES = st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 4]))


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(bool, SHAPES), st.sampled_from([1, 5]), st.sampled_from([1, 3]), st.booleans())
def test_places_and_their_readers(read_BL: np.ndarray, count: int, chunk_len: int, part_before: bool) -> None:
    """Every chunk that is read has a place, in order, while there are places; a token finds what it reads."""
    B, L = read_BL.shape
    places = places_of(jnp.asarray(read_BL), count)
    wanted = np.flatnonzero(read_BL.reshape(-1))
    assert bool(places.too_few) == (len(wanted) > count)
    placed = wanted[:count]
    np.testing.assert_array_equal(places.chunks_Y[: len(placed)], placed)
    assert (np.asarray(places.chunks_Y[len(placed) :]) >= B * L).all()
    chunks_BL = np.arange(1, B * L + 1, dtype=np.float32).reshape(B, L)
    packed_1Y = np.asarray(places.pack(jnp.asarray(chunks_BL)))
    np.testing.assert_array_equal(packed_1Y[0], np.pad(placed + 1, (0, count - len(placed))))
    last = np.where(np.isin(np.arange(B) * L + L - 1, placed), chunks_BL[:, -1], 0)
    np.testing.assert_array_equal(places.last_chunks(jnp.asarray(packed_1Y))[0], last)

    readers = readers_of(places, chunk_len, part_before=part_before)
    tokens_BT = np.arange(1, B * L * chunk_len + 1, dtype=np.float32).reshape(B, L * chunk_len)
    before_Y = -np.arange(1, B + 1) if part_before else np.zeros(0)
    content_Y = np.concatenate([before_Y, packed_1Y[0]])
    answers = np.asarray(readers.unpack(jnp.asarray(np.repeat(content_Y, chunk_len)[None])))
    queries = np.asarray(readers.pack(jnp.asarray(tokens_BT)))[0]
    for row in range(B):
        for token in range(L * chunk_len):
            chunk = (token - chunk_len + 1) // chunk_len
            if chunk < 0:
                expected = -(row + 1) if part_before else 0
            else:
                expected = chunks_BL[row, chunk] if row * L + chunk in placed else 0
            assert answers[row, token] == expected
            if expected != 0:
                place = np.flatnonzero(content_Y == expected)[0]
                assert queries[place * chunk_len + (token - chunk_len + 1) % chunk_len] == tokens_BT[row, token]
    assert (queries > 0).sum() == (answers != 0).sum()


def test_the_gradient_of_packing_is_its_transpose() -> None:
    read_BL = jnp.asarray([[True, False, True], [False, True, True]])
    places = places_of(read_BL, 5)
    readers = readers_of(places, 2, part_before=False)
    random = np.random.default_rng(0)
    cases = [(places.pack, (2, 3, 4), (1, 5, 4)), (readers.pack, (2, 6, 4), (1, 10, 4)), (readers.unpack, (1, 10, 4), (2, 6, 4))]
    for function, shape_in, shape_out in cases:
        x, y = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in (shape_in, shape_out))
        _, back = jax.vjp(function, x)
        np.testing.assert_allclose(jnp.vdot(function(x), y), jnp.vdot(x, back(y)[0]), rtol=1e-5)


@pytest.mark.parametrize("cross_document", [False, True])
def test_which_chunks_are_read(cross_document: bool) -> None:
    """By the definition: chunk l by the tokens from its last to the one before the end of the next."""
    batch = three_rows()
    valid_BL = jnp.asarray(batch.neighbour_mask.any((2, 3)))
    how = {"chunk_len": C, "first_chunk_len_B": None, "cross_document": cross_document}
    reads_BT = np.asarray(reads(jnp.asarray(batch.segments), valid_BL, **how))
    expected = [[reads_BT[row, (chunk + 1) * C - 1 : (chunk + 2) * C - 1].any() for chunk in range(6)] for row in range(2)]
    np.testing.assert_array_equal(chunks_read(jnp.asarray(reads_BT), C), expected)


@pytest.mark.parametrize(
    ("retro", "encoder", "model"),
    [
        pytest.param({}, {}, {}, marks=pytest.mark.slow),
        ({"null_key": 0.5, "gate": "learned", "conv_width": 3}, {"num_layers": 2}, {"num_kv_heads": 1}),
        (
            {"cross_document": True, "cca_positions": "none"},
            {"padding": "attended"},
            {"positions": "learned", "max_positions": 24},
        ),
        pytest.param(
            {},
            {"conditioning": "none", "embedding": "own", "width": 8},
            {"norm": "rmsnorm", "linear_bias": False},
            marks=pytest.mark.slow,
        ),
        pytest.param({}, {"num_layers": 0}, {}, marks=pytest.mark.slow),
    ],
)
def test_the_model_computes_what_it_computes_without_places(retro: dict, encoder: dict, model: dict) -> None:
    config = small(retro=retro, encoder=encoder, **{"max_positions": 24, **model})
    made, batch = randomised(config), three_rows()
    loss, gradients = loss_and_gradients(made, batch, None)
    packed, packed_gradients = loss_and_gradients(made, batch, 11)
    np.testing.assert_allclose(packed, loss, rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    for one, other in zip(jax.tree.leaves(packed_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * scale)


def test_dropout_drops_the_same() -> None:
    dropped = {"dropout": 0.2, "attention_dropout": 0.2}
    config = small(encoder=dropped, retro={"neighbour_dropout": 0.3}, max_positions=24, **dropped)
    made, batch, key = randomised(config), three_rows(), jax.random.key(3)
    run = nnx.jit(lambda model, places, key: model(batch, places=places, dropout_key=key), static_argnums=1)
    np.testing.assert_allclose(run(made, 11, key), run(made, None, key), atol=1e-5)
    assert float(jnp.abs(run(made, None, None) - run(made, None, key)).max()) > 1e-1


def test_too_few_places_give_nan() -> None:
    loss, _ = loss_and_gradients(randomised(small(max_positions=24)), three_rows(), 4)
    assert np.isnan(loss)


def test_places_and_a_first_chunk_of_its_own_are_refused() -> None:
    made = randomised(small())
    with pytest.raises(ValueError, match="first_chunk_len of their own cannot be .* packed"):
        made(rows(first=[3, 4]), places=2)
