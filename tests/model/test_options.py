"""Every option builds, runs, and does something; alone and in a spread of pairs."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ModelConfig
from tests.model.build import randomised, rows, run, small

# The first value of each is what `small` has. A dotted name is a field of EncoderConfig or RetroConfig.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "norm": ("layernorm", "layernorm1p", "rmsnorm"),
    "positions": ("rotary", "learned", "none"),
    "rotary_fraction": (1.0, 0.5),
    "rotary_scale": (1.0, 2.0),
    "activation": ("gelu", "gelu_tanh", "relu", "squared_relu", "swiglu"),
    "linear_bias": (True, False),
    "num_kv_heads": (None, 1),
    "head_dim": (None, 12),
    "tied_embedding": (True, False),
    "final_norm": (True, False),
    "encoder.num_layers": (1, 2, 0),
    "encoder.embedding": ("shared", "own", "own, narrower"),
    "encoder.num_heads": (None, 4),
    "encoder.ffn_dim": (None, 12),
    "encoder.positions": ("rotary", "learned", "none"),
    "encoder.conditioning": ("decoder", "none"),
    "encoder.cross_residual": ("stream", "normed"),
    "encoder.padding": ("masked", "attended"),
    "encoder.final_norm": (False, True),
    "retro.cca_layers": ((1, 2), (2,)),
    "retro.cca_positions": ("rotary", "none"),
    "retro.conv_width": (1, 3),
    "retro.null_key": (None, 0.0, 2.5),
    "retro.gate": (1.0, 0.5, "learned"),
    "retro.cross_document": (False, True),
}
# Two documents with an end inside a chunk, so that cross_document matters.
SEGMENTS = [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
# A tied embedding changes the logits, not the hidden states; LayerNorm1p stores another number for the same scale.
NO_EFFECT = {("tied_embedding", False), ("norm", "layernorm1p")}


def config_of(values: dict[str, Any], **more: Any) -> ModelConfig:
    parts: dict[str, dict[str, Any]] = {"encoder": {}, "retro": {}, "": {}}
    for name, value in values.items():
        part, _, field = name.rpartition(".")
        if value == "own, narrower":
            parts["encoder"] |= {"embedding": "own", "width": 8}
        else:
            parts[part][field] = value
    return small(encoder=parts["encoder"], retro=parts["retro"], **parts[""], **more)


def pairwise() -> list[dict[str, Any]]:
    """Rows of one value for each option, greedily chosen until every pair of values of two options has been together."""
    choices = {name: range(len(values)) for name, values in OPTIONS.items()}
    missing = {((a, i), (b, j)) for a, b in itertools.combinations(choices, 2) for i in choices[a] for j in choices[b]}
    made = []
    while missing:
        row = dict(min(missing))
        for name in choices:
            if name not in row:
                row[name] = max(choices[name], key=partial(pairs_met, missing, row, name))
        missing -= {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(choices, 2)}
        made.append({name: OPTIONS[name][row[name]] for name in choices})
    return made


def pairs_met(missing: set, row: dict[str, int], name: str, choice: int) -> int:
    """How many pairs with the choices of a row are met for the first time."""
    order = list(OPTIONS)
    return sum(tuple(sorted([(name, choice), other], key=lambda c: order.index(c[0]))) in missing for other in row.items())


PAIRS = pairwise()


@pytest.mark.parametrize("number", [pytest.param(i, marks=[pytest.mark.slow] if i >= 1 else []) for i in range(len(PAIRS))])
def test_pairs_of_options_give_the_same_in_both_implementations(number):
    """Values, and gradients of every parameter, in float64: the XLA kernels against the references."""
    values = PAIRS[number]
    batch = rows(number, segments=SEGMENTS)
    with jax.enable_x64(True):
        model, reference = (
            randomised(config_of(values, implementation=name), dtype=jnp.float64) for name in ("xla", "reference")
        )
        weights = np.random.default_rng(0).standard_normal((2, 12, 16))

        @partial(jax.jit, static_argnums=0)
        def value_and_gradient(graph, state):
            def loss(state):
                hidden = nnx.merge(graph, state)(batch)
                return jnp.sum(hidden * weights), hidden

            return jax.value_and_grad(loss, has_aux=True)(state)

        (_, hidden), gradient = value_and_gradient(*nnx.split(model))
        (_, hidden_reference), gradient_reference = value_and_gradient(*nnx.split(reference))
        assert hidden.dtype == jnp.float64
        np.testing.assert_allclose(hidden, hidden_reference, atol=1e-10)  # measured 2e-14
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_reference), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9 * max(1.0, float(np.abs(b).max())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in OPTIONS.items() for value in values[1:] if (name, value) not in NO_EFFECT],
)
def test_every_option_changes_the_result(name, value):
    batch = rows(0, segments=SEGMENTS)
    other = run(randomised(config_of({name: value})), batch)
    assert np.isfinite(other).all()
    difference = np.abs(other - run(randomised(small()), batch)).max()
    assert difference > 1e-4, f"{name}={value!r} changes nothing"


def test_layernorm1p_stores_what_the_scale_is_above_one():
    """``randomised`` draws such a scale without the 1."""
    batch = rows(0, segments=SEGMENTS)
    np.testing.assert_allclose(run(randomised(small(norm="layernorm1p")), batch), run(randomised(small()), batch), atol=1e-5)
