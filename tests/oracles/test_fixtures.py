"""The model computes what Megatron's Retro (core and legacy), Llama, GPT-2 and BERT compute, and mistakes in it are seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.config import ModelConfig, RetroConfig
from retro_jax.model import retro as retro_module
from tests.oracles.run import FLOAT32_LARGE, FLOAT64, Fixture, compare, loss_and_logits, read_fixture, to_ours

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = ("mcore_gpt_stock", "mcore_instruct", "legacy_instruct", "hf_llama_gqa", "hf_gpt2")


def fixture(name: str) -> Fixture:
    return read_fixture(FIXTURES / f"{name}.npz")


@pytest.mark.parametrize("precision", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_as_the_original(name: str, precision: str) -> None:
    errors = compare(fixture(name), precision)
    assert errors.gradient is not None
    assert errors.passes, errors


def test_in_float64_nothing_but_rounding_is_left() -> None:
    errors = compare(fixture("mcore_gpt_stock"), "float64")
    assert errors.passes and errors.bound == FLOAT64, errors


def test_with_gate_0_as_the_original_without_retrieval() -> None:
    legacy = fixture("legacy_instruct")
    silent = dataclasses.replace(legacy, config=_retro(legacy.config, gate=0.0))
    np.testing.assert_allclose(logits(silent), legacy.arrays["out/logits_gate0"], atol=5e-5)


def _model(**changes: object) -> Callable[[Fixture], Fixture]:
    return lambda right: dataclasses.replace(right, config=dataclasses.replace(right.config, **changes))  # type: ignore[arg-type]


def _cca(**changes: object) -> Callable[[Fixture], Fixture]:
    return lambda right: dataclasses.replace(right, config=_retro(right.config, **changes))


def _encoder(**changes: object) -> Callable[[Fixture], Fixture]:
    def wrong(right: Fixture) -> Fixture:
        assert right.config.retro is not None
        encoder = dataclasses.replace(right.config.retro.encoder, **changes)  # type: ignore[arg-type]
        return dataclasses.replace(right, config=_retro(right.config, encoder=encoder))

    return wrong


def _a_token_late(right: Fixture) -> Fixture:
    assert right.batch.first_chunk_len is not None
    return dataclasses.replace(right, batch=right.batch._replace(first_chunk_len=right.batch.first_chunk_len + 1))


def _of_the_chunk_before(right: Fixture) -> Fixture:
    return dataclasses.replace(right, batch=right.batch._replace(neighbours=np.roll(right.batch.neighbours, 1, axis=1)))


def _swapped_norms(right: Fixture) -> Fixture:
    first, second = (f"param/decoder.layers.{layer}.input_layernorm.weight" for layer in range(2))
    arrays = dict(right.arrays)
    arrays[first], arrays[second] = arrays[second], arrays[first]
    return dataclasses.replace(right, arrays=arrays)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("mcore_gpt_stock", _model(activation="gelu_tanh")),
        ("mcore_instruct", _encoder(cross_residual="stream")),
        ("mcore_instruct", _of_the_chunk_before),
        ("legacy_instruct", _a_token_late),
        pytest.param("mcore_gpt_stock", _model(norm_eps=1e-4), marks=SLOW),
        pytest.param("mcore_gpt_stock", _encoder(positions="none"), marks=SLOW),
        pytest.param("mcore_gpt_stock", _swapped_norms, marks=SLOW),
        pytest.param("mcore_instruct", _model(norm="layernorm"), marks=SLOW),
        pytest.param("mcore_instruct", _model(rotary_fraction=1.0), marks=SLOW),
        pytest.param("mcore_instruct", _cca(cca_positions="rotary"), marks=SLOW),
        # The short first chunk is filled up with keys that are attended to.
        pytest.param("legacy_instruct", _encoder(padding="masked"), marks=SLOW),
    ],
)
def test_a_mistake_is_seen(name: str, mistake: Callable[[Fixture], Fixture]) -> None:
    right = fixture(name)
    assert np.abs(logits(mistake(right)) - right.arrays["f64/logits"]).max() > 2 * FLOAT32_LARGE


def test_a_mask_one_token_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = retro_module.causal_mask
    monkeypatch.setattr(retro_module, "causal_mask", lambda segments: causal(segments)._replace(first=jnp.int32(1)))
    right = fixture("mcore_instruct")
    assert np.abs(logits(right) - right.arrays["f64/logits"]).max() > 2 * FLOAT32_LARGE


def logits(given: Fixture) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(loss_and_logits(given))(to_ours(given, given.named("param"), np.dtype(np.float32)))[1])


def _retro(config: ModelConfig, **changes: object) -> ModelConfig:
    assert isinstance(config.retro, RetroConfig)
    return dataclasses.replace(config, retro=dataclasses.replace(config.retro, **changes))  # type: ignore[arg-type]
