"""AdamW against steps computed by hand, its schedule, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.config import ChunkConfig, EncoderConfig, ModelConfig, OptimizerConfig, RetroConfig
from retro_jax.training.optimizer import decays, is_trained, learning_rate, make_optimizer
from retro_jax.training.state import ParameterFacts, Path, initial_state, model_form, names

MATRIX, BIAS, SCALE = ("layer", "weight"), ("layer", "bias"), ("norm", "scale")
FACTS = {
    MATRIX: ParameterFacts((2, 3), ("width", "ffn")),
    BIAS: ParameterFacts((3, 2), ("heads", "head_dim")),
    SCALE: ParameterFacts((4, 3), ("width",)),  # a 1-D weight of a stack of four layers
}
# All terms at once; the numbers are of no importance.
CONFIG = OptimizerConfig(
    learning_rate=0.1, min_learning_rate=0.02, warmup_steps=2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=1.5
)


def tree(seed: int) -> dict:
    random = np.random.default_rng(seed)
    values: dict = {}
    for (group, name), fact in FACTS.items():
        values.setdefault(group, {})[name] = jnp.asarray(random.normal(size=fact.shape), jnp.float32)
    return values


def by_path(values: dict) -> dict[Path, np.ndarray]:
    return {path: np.asarray(values[path[0]][path[1]], np.float64) for path in FACTS}


@pytest.mark.parametrize("mask", ["matrices", "all"])
def test_steps_are_those_of_adamw(mask: str) -> None:
    config = dataclasses.replace(CONFIG, decay_mask=mask)
    optimizer = make_optimizer(config, 5, FACTS)
    params = tree(0)
    state = optimizer.init(params)
    p = by_path(params)
    m, v = dict.fromkeys(FACTS, 0.0), dict.fromkeys(FACTS, 0.0)
    for step in range(1, 6):
        gradient = jax.tree.map(lambda g: g * step, tree(step))  # noqa: B023
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        g = by_path(gradient)
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        assert norm > config.clip_norm
        rate = 0.1 * step / 2 if step <= 2 else 0.02 + 0.08 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 3))
        for path in FACTS:
            clipped = g[path] * config.clip_norm / norm
            m[path] = 0.8 * m[path] + 0.2 * clipped
            v[path] = 0.9 * v[path] + 0.1 * clipped**2
            update = (m[path] / (1 - 0.8**step)) / (np.sqrt(v[path] / (1 - 0.9**step)) + 1e-3)
            decay = 0.3 * p[path] if mask == "all" or path == MATRIX else 0.0
            p[path] = p[path] - rate * (update + decay)
    for path, value in by_path(params).items():
        np.testing.assert_allclose(value, p[path], rtol=2e-5, atol=2e-6)  # measured 3e-7


def test_a_small_gradient_is_not_scaled_up_and_zero_turns_clipping_off() -> None:
    params, gradient = tree(0), jax.tree.map(lambda g: g * 0.01, tree(1))

    def update(clip_norm: float) -> list[np.ndarray]:
        config = OptimizerConfig(clip_norm=clip_norm, eps=1.0, warmup_steps=0)  # eps 1: the size of the gradient counts
        optimizer = make_optimizer(config, 10, FACTS)
        with jax.numpy_dtype_promotion("standard"):
            return [np.asarray(u) for u in jax.tree.leaves(optimizer.update(gradient, optimizer.init(params), params)[0])]

    for small, off in zip(update(1.0), update(0.0), strict=True):
        np.testing.assert_array_equal(small, off)
    assert any((a != b).any() for a, b in zip(update(1e-3), update(0.0), strict=True))


def test_the_rate_rises_then_falls_on_half_a_cosine_to_its_minimum() -> None:
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [float(learning_rate(config, 12)(step)) for step in range(14)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[7], 0.55, rtol=1e-6)  # half way from step 4 to 12
    np.testing.assert_allclose(rates[11:], 0.1, rtol=1e-6)
    assert rates[3:12] == sorted(rates[3:12], reverse=True)


def test_the_constant_rate_stays_after_the_warmup() -> None:
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", warmup_steps=2)
    assert [float(learning_rate(config, 5)(step)) for step in range(5)] == [0.25, 0.5, 0.5, 0.5, 0.5]
    at_once = OptimizerConfig(learning_rate=0.5, schedule="constant", warmup_steps=0)
    assert float(learning_rate(at_once, 5)(0)) == 0.5


def model(gate: float | str = 1.0) -> ModelConfig:
    chunks = ChunkConfig(chunk_len=8, retrieved_len=16)
    retro = RetroConfig(
        chunks=chunks, encoder=EncoderConfig(num_layers=1), cca_layers=(2, 4), gate=gate, conv_width=2, null_key=0.0
    )
    return ModelConfig(vocab_size=64, width=16, num_layers=4, num_heads=2, retro=retro)


def test_matrices_decay_and_biases_norms_and_scalars_do_not() -> None:
    form = model_form(model("learned"), is_trained(model("learned")))
    config = OptimizerConfig()
    kept = {".".join(map(str, path)): fact for path, fact in form.facts.items() if not decays(path, fact, config)}
    decayed = {".".join(map(str, path)): fact for path, fact in form.facts.items() if decays(path, fact, config)}
    # Stacked, a bias of two dims has three and a norm's scale two: the dims of one layer count.
    assert {name.split(".")[-1] for name in kept} == {"bias", "scale", "gate", "null_logit"}
    assert {name.split(".")[-1] for name in decayed} == {"weight", "table", "key_conv", "query_conv"}
    assert all(len(fact.shape) >= 2 for fact in decayed.values())
    assert all(decays(path, fact, OptimizerConfig(decay_mask="all")) for path, fact in form.facts.items())


def test_with_gate_0_the_retrieval_path_has_no_moments() -> None:
    config = OptimizerConfig()
    sizes = {}
    for gate in (1.0, 0.0):
        form = model_form(model(gate), is_trained(model(gate)))
        state = initial_state(form, make_optimizer(config, 10, form.trained), seed=0)
        sizes[gate] = sum(leaf.size for leaf in jax.tree.leaves(state.moments))
        frozen = names(state.frozen)
        assert bool(frozen) == (gate == 0.0)
        assert all("cca" in name or "encoder" in name for name in frozen)
        assert not any("cca" in name or "encoder" in name for name in names(state.params)) or gate == 1.0
        assert len(frozen) + len(names(state.params)) == len(form.facts)
    plain = model_form(dataclasses.replace(model(), retro=None), lambda path: True)
    assert sizes[0.0] - 2 == 2 * sum(math.prod(fact.shape) for fact in plain.facts.values()) < sizes[1.0] - 2
