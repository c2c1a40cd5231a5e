"""A step on any mesh is the step of one device: loss and every gradient, under every recomputation policy."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from retro_jax.config import EncoderConfig, MeshConfig, TrainConfig
from retro_jax.parallel.layout import make_layout
from retro_jax.training.state import initial_state
from retro_jax.training.step import make_valid_step
from tests.parallel.build import alone, assert_same, batch, first_state, model_config, prepared, step

POLICIES = ("none", "selective", "full", "offload")
SIZES = (1, 2, 4, 8)
MESHES = [sizes for sizes in itertools.product(SIZES, repeat=4) if 1 < sizes[0] * sizes[1] * sizes[2] * sizes[3] <= 8]
# (form, policy, (data, fsdp, sequence, tensor)): every two axes together, and every policy; a Retro takes three times as long.
CHOSEN = [
    ("gpt", "none", (1, 1, 4, 2)),
    ("gpt", "selective", (2, 2, 2, 1)),
    ("gpt", "offload", (2, 1, 1, 4)),
    ("retro", "full", (1, 2, 2, 2)),
]
SLOW = [case for case in itertools.product(("gpt", "retro"), POLICIES, MESHES) if case not in CHOSEN]


@pytest.mark.parametrize(("form", "policy", "sizes"), [*CHOSEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_mesh_gives_what_one_device_gives(form: str, policy: str, sizes: tuple[int, int, int, int]) -> None:
    data, fsdp, sequence, tensor = sizes
    mesh = MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
    assert_same(step(model_config(form, recompute=policy), mesh), alone(model_config(form)))


@pytest.mark.slow
def test_exceptions_to_a_policy_change_no_number() -> None:
    exceptions = ("attention_gathered=save", "cca_gathered=save", "ffn_up=recompute", "cca_out=offload")
    model = model_config("retro", recompute="selective", recompute_names=exceptions)
    assert_same(step(model, MeshConfig(tensor=2)), alone(model_config("retro")))


@pytest.mark.parametrize(
    ("form", "sizes", "accumulate"),
    [
        ("gpt", (2, 1, 2, 2), 2),
        pytest.param("retro", (2, 1, 2, 2), 2, marks=pytest.mark.slow),
        pytest.param("retro", (1, 2, 1, 4), 1, marks=pytest.mark.slow),
        pytest.param("retro", (1, 1, 4, 2), 4, marks=pytest.mark.slow),
    ],
)
def test_the_same_is_dropped_on_every_mesh(form: str, sizes: tuple[int, int, int, int], accumulate: int) -> None:
    """Of streams, attention weights (decoder, CCA, encoder) and neighbours; in however many parts the batch is accumulated."""
    model = model_config(form, dropout=0.2, attention_dropout=0.2)
    if model.retro is not None:
        encoder = EncoderConfig(num_layers=1, dropout=0.2, attention_dropout=0.2)
        model = dataclasses.replace(model, retro=dataclasses.replace(model.retro, encoder=encoder, neighbour_dropout=0.3))
    data, fsdp, sequence, tensor = sizes
    mesh = MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
    assert_same(step(model, mesh, accumulate=accumulate), alone(model))
    assert abs(alone(model).loss - alone(model_config(form)).loss) > 1e-4


@pytest.mark.slow
def test_other_forms_of_the_retrieval_path() -> None:
    """Its own embedding with learned positions, an encoder without conditioning, one key/value head for all devices."""
    model = model_config("retro", num_kv_heads=1, positions="learned", linear_bias=False)
    assert model.retro is not None
    encoder = EncoderConfig(num_layers=1, embedding="own", positions="learned", conditioning="none", final_norm=True)
    retro = dataclasses.replace(model.retro, encoder=encoder, conv_width=1, null_key=None, cross_document=True)
    model = dataclasses.replace(model, retro=retro)
    assert_same(step(model, MeshConfig(fsdp=2, sequence=2, tensor=2)), alone(model))


def test_each_device_draws_its_part_of_the_same_parameters() -> None:
    """And the validation step's sums are those of one device."""
    model = model_config("gpt")
    form, optimizer = prepared(model)
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    assert layout is not None
    state, expected = initial_state(form, optimizer, 0, layout), first_state(model)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    up = state.params["decoder"][0]["group"]["layers"][0]["ffn"]["up"]["weight"]
    assert up.shape == (2, 32, 2, 64) and up.addressable_shards[0].data.shape == (2, 16, 2, 32)
    train = TrainConfig(precision="float32", loss_chunk=20)
    sums = jax.jit(make_valid_step(form, train, layout))(state.params, state.frozen, layout.place(batch()))
    alone = jax.jit(make_valid_step(form, train))(expected.params, expected.frozen, batch())
    np.testing.assert_allclose(sums, alone, rtol=1e-6)
