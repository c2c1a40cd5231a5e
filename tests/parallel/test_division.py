"""The neighbour encoder divided by heads and by chunks: the same numbers, the bytes that are told beforehand, and the choice."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from retro_jax.config import ChunkConfig, Config, DataConfig, EncoderConfig, EvalConfig, MeshConfig, ModelConfig, RetroConfig
from retro_jax.model.division import Received, encodes_own_chunks, layers_receive
from retro_jax.model.encoder import NeighbourEncoder
from retro_jax.parallel.layout import make_layout
from retro_jax.planning.program import collectives
from retro_jax.training.state import Tree, divided_params
from tests.parallel import build
from tests.parallel.build import B, K, L, R, T, alone, assert_same, batch, model_config, prepared, program, step, with_encoder

POLICIES = ("none", "selective", "full", "offload")
# (fsdp, sequence, tensor). Those of test_meshes divide by chunks, which sends less at their sizes.
CHOSEN = [("heads", "none", (2, 2, 2))]
MESHES = [(1, 1, 2), (1, 1, 8), (1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 2, 2), (4, 1, 2)]
SLOW = [case for case in itertools.product(("heads", "chunks"), POLICIES, MESHES) if case not in CHOSEN]


@pytest.mark.parametrize(
    ("division", "policy", "sizes"), [*CHOSEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_each_division_gives_what_one_device_gives(division: str, policy: str, sizes: tuple[int, int, int]) -> None:
    model = with_encoder(model_config("retro", recompute=policy), division=division)
    assert_same(step(model, mesh_of(sizes)), alone(model_config("retro")))


def mesh_of(sizes: tuple[int, int, int]) -> MeshConfig:
    fsdp, sequence, tensor = sizes
    return MeshConfig(fsdp=fsdp, sequence=sequence, tensor=tensor)


@pytest.mark.slow
@pytest.mark.parametrize("division", ["heads", "chunks"])
def test_the_same_is_dropped_in_both(division: str) -> None:
    model = dropping()
    assert_same(step(with_encoder(model, division=division), MeshConfig(sequence=2, tensor=4)), alone(model))


def dropping() -> ModelConfig:
    model = with_encoder(model_config("retro", dropout=0.2, attention_dropout=0.2), dropout=0.2, attention_dropout=0.2)
    assert model.retro is not None
    return dataclasses.replace(model, retro=dataclasses.replace(model.retro, neighbour_dropout=0.3))


OTHER = {"num_layers": 2, "embedding": "own", "positions": "learned", "final_norm": True, "padding": "attended"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "encoder", "sizes"),
    [
        ({"num_kv_heads": 1, "positions": "learned"}, OTHER | {"width": 16, "num_heads": 4, "ffn_dim": 32}, (2, 1, 4)),
        ({"num_kv_heads": 1}, OTHER | {"cross_residual": "normed"}, (2, 2, 2)),
        ({"positions": "learned", "activation": "swiglu"}, {"positions": "learned"}, (1, 2, 4)),
        ({"linear_bias": False}, {"conditioning": "none", "num_layers": 2}, (1, 2, 4)),
        ({"norm": "rmsnorm"}, {"conditioning": "none", "num_layers": 0}, (1, 2, 4)),
    ],
)
def test_other_encoders_by_chunks(model: dict, encoder: dict, sizes: tuple[int, int, int]) -> None:
    expected = with_encoder(model_config("retro", **model), **encoder)
    assert_same(step(with_encoder(expected, division="chunks"), mesh_of(sizes)), alone(expected))


@pytest.mark.slow
def test_tokens_of_a_neighbour_need_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 tokens among 4 devices: the chunk that rows in parts hand on goes whole."""
    for name, size in (("C", 2), ("T", L * 2), ("R", 6)):
        monkeypatch.setattr(build, name, size)
    model = model_config("retro")
    assert_same(step(model, MeshConfig(sequence=2, tensor=4)), alone(model))


@pytest.mark.parametrize(
    ("policy", "conditioning"), [("none", "decoder"), ("selective", "none"), ("full", "decoder"), ("offload", "decoder")]
)
def test_the_bytes_are_those_of_the_program(policy: str, conditioning: str) -> None:
    """What a program with an encoder of two layers receives beyond one without layers."""
    model = shallow(recompute=policy, num_kv_heads=1, width=16, head_dim=8)
    told = expected_bytes(with_encoder(model, num_layers=2, conditioning=conditioning), tensor=4)
    nothing = received(with_encoder(model, num_layers=0, conditioning="none"), MeshConfig(tensor=4))
    for division in ("heads", "chunks"):
        whole = received(with_encoder(model, num_layers=2, conditioning=conditioning, division=division), MeshConfig(tensor=4))
        assert whole - nothing == getattr(told, division), division


@pytest.mark.parametrize("gathered", ["save", pytest.param("offload", marks=pytest.mark.slow)])
def test_inputs_saved_whole_are_gathered_once_less(gathered: str) -> None:
    names = tuple(f"{part}_gathered={gathered}" for part in ("attention", "cross", "ffn"))
    model = shallow(recompute="selective", recompute_names=names)
    found = received(with_encoder(model, division="heads"), MeshConfig(tensor=2))
    less = found - received(with_encoder(model, num_layers=0, conditioning="none"), MeshConfig(tensor=2))
    assert less == expected_bytes(model, tensor=2).heads


def test_bytes_by_hand() -> None:
    """A conditioned layer of 12 + 4 matrices of D x D, by heads 15 times the tokens and 2 times the states; float32."""
    D, t = 32, 2
    model = model_config("retro", num_kv_heads=None, ffn_dim=4 * D, linear_bias=False)
    tokens, states = B * L * K * R, B * T
    assert expected_bytes(model, tensor=t) == Received(
        heads=4 * (15 * tokens * D + 2 * states * D) * (t - 1) // t, chunks=4 * 3 * 16 * D * D * (t - 1) // t
    )


@pytest.mark.parametrize(("width", "fewer"), [(16, "chunks"), (256, "heads")])
def test_auto_receives_the_fewer_bytes(width: int, fewer: str) -> None:
    """Small weights and many tokens, or large weights and as many."""
    model = shallow(width=width, head_dim=4, ffn_dim=16 * width)
    by = {
        division: received(with_encoder(model, division=division), MeshConfig(tensor=4))
        for division in ("auto", "heads", "chunks")
    }
    assert by["auto"] == by[fewer] == min(by.values()) < max(by.values())


def shallow(**model: Any) -> ModelConfig:
    """A single layer, with CCA."""
    config = model_config("retro", num_layers=2, **model)
    assert config.retro is not None
    return dataclasses.replace(config, num_layers=1, retro=dataclasses.replace(config.retro, cca_layers=(1,)))


def received(model: ModelConfig, mesh: MeshConfig) -> int:
    """Bytes along tensor in a step, but for the sums of gradients that each device has in part."""
    found = collectives(program(model, mesh))
    return sum(e.received * e.times for e in found if e.axes == ("tensor",) and e.operation in ("all_gather", "reduce_scatter"))


def expected_bytes(model: ModelConfig, *, tensor: int) -> Received:
    told = []
    in_a_trace(model, tensor, lambda encoder: told.append(layers_receive(encoder, B * L * K * R, B * T * model.width)))
    return told[0]


def in_a_trace(model: ModelConfig, tensor: int, call: Callable[[NeighbourEncoder], object]) -> None:
    """Calls with the encoder that one device holds."""
    layout, (form, _) = make_layout(MeshConfig(tensor=tensor)), prepared(model)
    assert layout is not None

    def function(params: Tree) -> jax.Array:
        encoder = form.merge(params, {}).encoder
        assert encoder is not None
        call(encoder)
        return jnp.zeros(())

    jax.make_jaxpr(layout.run(function, form.specs(layout)[:1], P()))(divided_params(form, layout)[0])


def test_what_cannot_be_divided_by_chunks() -> None:
    chunks = ChunkConfig(chunk_len=64, num_neighbours=2, retrieved_len=64)

    def config(division: str, seq_len: int, **mesh: int) -> Config:
        encoder = EncoderConfig(division=division)  # type: ignore[arg-type]
        model = ModelConfig(max_positions=seq_len, retro=RetroConfig(chunks=chunks, encoder=encoder))
        data, evaluation = DataConfig(seq_len=seq_len, batch_size=8), EvalConfig(window=512, stride=512)
        return Config(chunks=chunks, model=model, data=data, evaluation=evaluation, mesh=MeshConfig(**mesh))

    with pytest.raises(ValueError, match=r"'chunks' cannot share .* = 512 / \(64 \* 2\) = 4 chunks among MeshConfig.tensor=8"):
        config("chunks", 512, sequence=2, tensor=8)
    few = r"retrieved_len=64 is not a multiple of MeshConfig.tensor=128; change one of them"
    with pytest.raises(ValueError, match=few):
        config("heads", 64 * 128, tensor=128)
    with pytest.raises(ValueError, match=few):
        config("auto", 64 * 64, tensor=128)
    for division in ("auto", "chunks"):
        assert config(division, 64 * 128, tensor=128).mesh.tensor == 128
    with pytest.raises(ValueError, match=r"EncoderConfig.division='rows' is not known; choose one of auto, heads, chunks"):
        EncoderConfig(division="rows")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("division", "neighbours", "first", "told"),
    [
        ("chunks", (B, 6, K, R), None, r"'chunks' cannot share a row's 6 chunks among MeshConfig.tensor=4 devices; change"),
        ("chunks", (B, L, K, R), 3, r"'chunks' cannot share rows with a first_chunk_len of their own .* or use 'heads'"),
        ("heads", (B, L, K, 6), None, r"retrieved_len=6 is not a multiple of MeshConfig.tensor=4"),
        ("auto", (B, 6, K, 6), None, r"retrieved_len=6 is not a multiple of MeshConfig.tensor=4"),
        ("auto", (B, L, K, R), None, True),
        ("auto", (B, L, K, 6), None, True),
        ("auto", (B, 6, K, R), None, False),
        ("auto", (B, L, K, R), 3, False),
        ("heads", (B, L, K, R), None, False),
    ],
)
def test_what_the_model_does_and_refuses(division: str, neighbours: tuple, first: int | None, told: str | bool) -> None:
    rows = batch()._replace(
        neighbours=np.zeros(neighbours, np.int32), first_chunk_len=None if first is None else np.full((B,), first, np.int32)
    )
    model, states, answers = with_encoder(model_config("retro"), division=division), jnp.zeros((B, T // 4, 32)), []
    ask = partial(in_a_trace, model, 4, lambda encoder: answers.append(encodes_own_chunks(encoder, rows, states)))
    if isinstance(told, bool):
        ask()
        assert answers == [told]
    else:
        with pytest.raises(ValueError, match=told):
            ask()
