"""The draw against numbers worked out by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.generation.sampling import Sampling, draw, least_kept, penalised, permitted

# Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625, out of order.
SHARES = (0.125, 0.5, 0.0625, 0.25, 0.0625)
LOGITS = jnp.log(jnp.asarray([SHARES], jnp.float32))


def sampling(**settings: object) -> Sampling:
    default = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "vocab_size": 5, "never": None}
    return Sampling(**{**default, **settings})  # type: ignore[arg-type]


def kept(top_k: int, top_p: float) -> list[int]:
    return np.flatnonzero(np.asarray(LOGITS >= least_kept(LOGITS, top_k, top_p))[0]).tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "ids"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [1]),
        (3, 1.0, [0, 1, 3]),
        (4, 1.0, [0, 1, 2, 3, 4]),  # two are equally likely
        (9, 1.0, [0, 1, 2, 3, 4]),
        (0, 0.3, [1]),
        (0, 0.5, [1]),  # what lies before the second is 0.5, no less than asked
        (0, 0.51, [1, 3]),
        (0, 0.8, [0, 1, 3]),
        (2, 0.6, [1]),  # of the two, 2/3 and 1/3, the first suffices
        (2, 0.7, [1, 3]),
    ],
)
def test_what_may_be_drawn(top_k: int, top_p: float, ids: list[int]) -> None:
    assert kept(top_k, top_p) == ids


def test_repetition_is_penalised_by_sign() -> None:
    logits = jnp.asarray([[2.0, -2.0, 3.0, -3.0]])
    seen = jnp.asarray([[True, True, False, False]])
    np.testing.assert_allclose(penalised(logits, seen, 1.25), [[1.6, -2.5, 3.0, -3.0]])


def test_fillers_and_the_end_are_never_drawn() -> None:
    logits = permitted(jnp.asarray([[5.0, 1.0, 2.0, 9.0]]), sampling(vocab_size=3, never=0))
    np.testing.assert_array_equal(logits, [[-np.inf, 1.0, 2.0, -np.inf]])


def test_greedy_takes_the_most_probable_and_its_unchanged_probability() -> None:
    seen = jnp.asarray([[False, True, False, False, False]])
    sampled = draw(LOGITS + 3.0, sampling(temperature=0.0, repetition_penalty=10.0), seen, jnp.zeros(1, jnp.uint32), 0)
    assert int(sampled.token_B[0]) == 3 and bool(sampled.finite_B[0])
    assert float(sampled.log_probability_B[0]) == pytest.approx(math.log(0.25), abs=1e-6)


def test_what_is_not_finite_is_told_by_row() -> None:
    logits = jnp.concatenate([LOGITS, LOGITS.at[0, 2].set(jnp.nan), LOGITS.at[0, 1].set(jnp.inf)])
    assert draw(logits, sampling(), None, jnp.zeros(3, jnp.uint32), 0).finite_B.tolist() == [True, False, False]


def drawn(seeds: range, number: int = 0, **settings: object) -> np.ndarray:
    logits = jnp.broadcast_to(LOGITS, (len(seeds), 5))
    sampled = jax.jit(draw, static_argnums=1)(logits, sampling(**settings), None, jnp.asarray(seeds, jnp.uint32), number)
    return np.asarray(sampled.token_B)


def test_shares_are_those_of_the_distribution() -> None:
    """10,000 draws: a share's standard deviation is at most 0.005."""
    counts = np.bincount(drawn(range(10_000)), minlength=5) / 10_000
    np.testing.assert_allclose(counts, SHARES, atol=0.02)
    # At temperature 1/2 probabilities are squared: 1/4, 1/16, 1/64, twice 1/256, of which the first three are kept.
    counts = np.bincount(drawn(range(10_000), temperature=0.5, top_k=3), minlength=5) / 10_000
    np.testing.assert_allclose(counts, np.asarray([1 / 64, 1 / 4, 0, 1 / 16, 0]) / (21 / 64), atol=0.02)


def test_a_draw_belongs_to_seed_and_place_alone() -> None:
    first = drawn(range(50))
    np.testing.assert_array_equal(drawn(range(10, 40)), first[10:40])
    assert (drawn(range(50), number=1) != first).any()
