"""Baselines: the GPT twin, the parameter-matched GPT, and what a step of each costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from retro_jax.config import ChunkConfig, EncoderConfig, ModelConfig, RetroConfig
from retro_jax.data.batch import Batch
from retro_jax.errors import UserError
from retro_jax.model import count_parameters
from retro_jax.training.flops import forward_flops, train_flops
from retro_jax.training.state import model_form
from retro_jax.training.twins import matched_gpt, model_name, twin

CHUNKS = ChunkConfig(chunk_len=8, num_neighbours=2, retrieved_len=16)
FORMS = [
    ModelConfig(vocab_size=640, width=64, num_layers=4, num_heads=4, retro=RetroConfig(chunks=CHUNKS, cca_layers=(2, 4))),
    ModelConfig(
        vocab_size=512,
        width=48,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        activation="swiglu",
        norm="rmsnorm",
        linear_bias=False,
        tied_embedding=False,
        ffn_dim=100,
        retro=RetroConfig(
            chunks=CHUNKS,
            cca_layers=(1,),
            encoder=EncoderConfig(num_layers=3, width=24, num_heads=3, ffn_dim=40, embedding="own"),
        ),
    ),
    ModelConfig(
        vocab_size=256,
        width=32,
        num_layers=2,
        num_heads=2,
        retro=RetroConfig(chunks=CHUNKS, cca_layers=(2,), encoder=EncoderConfig(num_layers=0, conditioning="none")),
    ),
]


@pytest.mark.parametrize("config", FORMS)
def test_the_matched_gpt_has_as_many_parameters(config: ModelConfig) -> None:
    matched = matched_gpt(config)
    wanted = count_parameters(config)
    assert abs(count_parameters(matched) - wanted) <= 0.01 * wanted
    assert count_parameters(twin(config, "gpt")) < 0.97 * wanted
    assert dataclasses.replace(matched, ffn_dim=config.ffn_dim, retro=config.retro) == config
    assert twin(config, "gpt") == dataclasses.replace(config, retro=None)


def test_names_and_a_gpt_without_baselines() -> None:
    assert model_name(FORMS[0]) == "retro" and model_name(twin(FORMS[0], "gpt")) == "gpt"
    with pytest.raises(UserError, match="names 'gpt_matched', but ModelConfig.retro is None"):
        twin(twin(FORMS[0], "gpt"), "gpt_matched")


def product_flops(jaxpr: Any, times: int = 1) -> float:
    """2 M N K of every matrix product of a program, those of a scan's body once a turn."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            inner = np.prod([equation.invars[0].aval.shape[dim] for dim in contract])
            total += 2.0 * times * inner * np.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += product_flops(inside, times * equation.params.get("length", 1))
    return total


@pytest.mark.parametrize("config", [*FORMS, dataclasses.replace(FORMS[0], retro=None)])
@pytest.mark.parametrize("gate", [1.0, 0.0])
def test_flops_are_those_of_the_programs_matrix_products(config: ModelConfig, gate: float) -> None:
    if config.retro is not None:
        config = dataclasses.replace(config, retro=dataclasses.replace(config.retro, gate=gate))
    config = dataclasses.replace(config, implementation="reference")
    B, L, K = 2, 3, 2
    T = L * CHUNKS.chunk_len
    tokens, mask = np.ones((B, T), np.int32), np.ones((B, T), np.float32)
    neighbours = np.ones((B, L, K, CHUNKS.retrieved_len), np.int32)
    batch = Batch(tokens, tokens, tokens, tokens, mask, neighbours, neighbours > 0)
    form = model_form(config, lambda path: True)

    def logits(batch: Batch) -> jax.Array:
        from retro_jax.model import Retro

        model = Retro(form.config, key=jax.random.key(0))
        return model(batch) @ model.output_table_VD().T

    counted = product_flops(jax.make_jaxpr(logits)(jax.tree.map(jax.numpy.asarray, batch)).jaxpr)
    assert counted == pytest.approx(forward_flops(config, rows=B, seq_len=T, neighbours=K), rel=1e-9)
    assert train_flops(config, rows=B, seq_len=T, neighbours=K) == 3 * forward_flops(config, rows=B, seq_len=T, neighbours=K)
    if config.retro is None or gate == 0.0:
        assert forward_flops(config, rows=B, seq_len=T, neighbours=0) == forward_flops(config, rows=B, seq_len=T, neighbours=K)
