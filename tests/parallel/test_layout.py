"""Who holds what, and what does not divide."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from retro_jax.config import Config, DataConfig, MeshConfig, ModelConfig, Recompute, TrainConfig
from retro_jax.errors import UserError
from retro_jax.parallel.layout import make_layout, make_mesh
from tests.parallel.build import model_config, prepared


def test_parameters_are_divided_by_their_dims() -> None:
    layout = make_layout(MeshConfig(fsdp=2, tensor=4))
    assert layout is not None
    expected = {
        ("vocab width", (64, 32)): P("tensor", "fsdp"),
        ("width heads head_dim", (3, 32, 8, 4)): P(None, "fsdp", "tensor", None),
        ("kv_width two kv_heads head_dim", (32, 2, 8, 4)): P("fsdp", None, "tensor", None),
        ("kv_width two kv_heads head_dim", (32, 2, 2, 4)): P("fsdp", None, None, None),  # fewer heads than devices: each has both
        ("heads head_dim width", (8, 4, 32)): P("tensor", None, "fsdp"),
        ("ffn width", (64, 32)): P("tensor", "fsdp"),
        ("ffn", (64,)): P("tensor"),
        ("width", (32,)): P(None),  # norms and biases are whole
        ("", ()): P(),
    }
    for (dims, shape), spec in expected.items():
        assert layout.parameter(tuple(dims.split()), shape) == spec, dims
    assert make_layout(MeshConfig()) is None


def test_every_parameter_of_a_retro_has_a_place() -> None:
    layout = make_layout(MeshConfig(fsdp=2, tensor=2))
    assert layout is not None
    form, _ = prepared(model_config("retro"))
    for path, fact in form.facts.items():
        spec = layout.parameter(fact.dims, fact.shape)
        assert ("fsdp" in spec) == (len(fact.dims) > 1 and not {"width", "kv_width"}.isdisjoint(fact.dims)), path
        assert ("tensor" in spec) == (not {"vocab", "heads", "kv_heads", "ffn"}.isdisjoint(fact.dims)), path


@pytest.mark.parametrize(
    ("model", "mesh", "told"),
    [
        ({"num_heads": 6, "head_dim": 4}, {"tensor": 4}, r"heads=6 is not divisible by MeshConfig.tensor=4; change one of them"),
        ({"num_kv_heads": 1, "num_heads": 3, "head_dim": 4, "ffn_dim": 66}, {"tensor": 3}, r"vocab=64 is not divisible"),
        ({"ffn_dim": 42}, {"tensor": 4}, r"ffn=42 is not divisible by MeshConfig.tensor=4"),
        ({"num_heads": 8, "num_kv_heads": 4, "vocab_size": 48}, {"tensor": 6}, r"not divisible by MeshConfig.tensor=6"),
        ({}, {"fsdp": 3}, r"width=32 is not divisible by MeshConfig.fsdp=3"),
        (
            {},
            {"fsdp": 2, "fsdp_dims": ("width", "head_dim")},
            r"divides two dims of a parameter \[heads head_dim width\]",
        ),
    ],
)
def test_what_does_not_divide_names_the_size(model: dict, mesh: dict, told: str) -> None:
    layout = make_layout(MeshConfig(**mesh))
    assert layout is not None
    form, _ = prepared(model_config("gpt", **model))
    with pytest.raises(UserError, match=told):
        form.specs(layout)


def test_more_devices_than_there_are() -> None:
    with pytest.raises(UserError, match=r"MeshConfig.data=4, MeshConfig.tensor=4 take 16 devices, and there are 8"):
        make_mesh(MeshConfig(data=4, tensor=4))


@pytest.mark.parametrize(
    ("mesh", "product"), [({}, r"data=1 \* fsdp=1 \* sequence=1 \* tensor=1 are 1"), ({"fsdp": 2, "tensor": 2}, "tensor=2 are 4")]
)
def test_several_processes_use_all_devices(mesh: dict, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default mesh each of them would train alone, in the same folder."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for make in (make_layout, make_mesh):
        with pytest.raises(UserError, match=rf"2 processes have 8 devices together, .*{product}; choose sizes whose product is"):
            make(MeshConfig(**mesh))
    assert make_layout(MeshConfig(data=2, fsdp=2, tensor=2)) is not None


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ({"sequence": 3}, r"seq_len=512 is not a multiple of ChunkConfig.chunk_len \* MeshConfig.sequence = 64 \* 3; use 576"),
        ({"tensor": 7}, r"seq_len=512 is not a multiple of MeshConfig.sequence \* tensor = 1 \* 7"),
        ({"tensor": 256}, r"retrieved_len=128 is not a multiple of MeshConfig.tensor=256"),
        (
            {"data": 2, "fsdp": 2},
            r"batch_size=6 is not a multiple of MeshConfig.data \* fsdp \* .* = 2 \* 2 \* 1; use 8",
        ),
    ],
)
def test_rows_that_do_not_divide(mesh: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Config(data=DataConfig(seq_len=512, batch_size=6), mesh=MeshConfig(**mesh))


def test_unknown_dims_policies_and_names() -> None:
    with pytest.raises(ValueError, match=r"MeshConfig.fsdp_dims names 'depth'; choose from width"):
        MeshConfig(fsdp_dims=("depth",))
    with pytest.raises(ValueError, match=r"MeshConfig.tensor=0 must be positive"):
        MeshConfig(tensor=0)
    with pytest.raises(ValueError, match=r"recompute='some' is not known; choose one of none, selective, full, offload"):
        ModelConfig(recompute="some")  # type: ignore[arg-type]
    for wrong in ("ffn_upp=save", "ffn_up", "ffn_up=keep"):
        with pytest.raises(ValueError, match=f"recompute_names has '{wrong}'; write NAME=save"):
            ModelConfig(recompute="full", recompute_names=(wrong,))
    with pytest.raises(ValueError, match=r"change nothing of recompute='none'"):
        ModelConfig(recompute_names=("ffn_up=save",))


def test_a_part_gathers_again_only_where_its_share_is_saved() -> None:
    assert Recompute.of("none").part("ffn").gathers_again
    assert Recompute.of("selective").part("ffn").gathers_again
    assert not Recompute.of("full").part("ffn").gathers_again
    assert not Recompute.of("selective", ["ffn_gathered=save"]).part("ffn").gathers_again
    assert Recompute.of("full", ["ffn_in=offload"]).part("ffn").gathers_again


def test_accumulated_parts_count() -> None:
    with pytest.raises(ValueError, match=r"= 1 \* 1 \* 4; use 8"):
        dataclasses.replace(Config(data=DataConfig(batch_size=6)), training=TrainConfig(accumulate=4))
