"""Parameters gathered over ``fsdp`` once a step: the same numbers, and what is exchanged."""

from __future__ import annotations

from math import prod

import pytest

from retro_jax.config import MeshConfig
from retro_jax.parallel.layout import make_layout
from retro_jax.planning.program import collectives
from tests.parallel.build import Trained, alone, assert_same, model_config, prepared, program, step


def once(**mesh: int) -> MeshConfig:
    return MeshConfig(fsdp_gather="step", **mesh)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "mesh", "accumulate", "policy", "trained"),
    [
        ("retro", {"fsdp": 2, "tensor": 2}, 4, "selective", "all"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("gpt", {"fsdp": 4}, 2, "none", "all"),
                ("gpt", {"fsdp": 2}, 1, "full", "all"),
                ("gpt", {"data": 2, "fsdp": 2, "tensor": 2}, 2, "selective", "all"),
                ("gpt", {"fsdp": 2, "tensor": 4}, 4, "none", "all"),
                ("retro", {"fsdp": 4, "tensor": 2}, 1, "none", "all"),
                ("retro", {"fsdp": 4, "sequence": 2}, 2, "full", "all"),
                ("retro", {"fsdp": 2, "sequence": 2, "tensor": 2}, 4, "offload", "all"),
                ("retro", {"fsdp": 4}, 2, "none", "retrieval"),
                ("retro", {"fsdp": 2, "tensor": 4}, 2, "none", "retrieval"),
            ]
        ),
    ],
)
def test_a_step_is_that_of_one_device(form: str, mesh: dict, accumulate: int, policy: str, trained: Trained) -> None:
    found = step(model_config(form, recompute=policy), once(**mesh), accumulate=accumulate, trained=trained)
    assert_same(found, alone(model_config(form), trained=trained))


@pytest.mark.parametrize("form", ["gpt", "retro"])
def test_each_parameter_is_gathered_once_and_its_gradient_summed_once(form: str) -> None:
    """In the dtype of the computation, and in float32; outside of the scans over parts and layers."""
    model, mesh = model_config(form), once(fsdp=2, tensor=2)
    layout, (state, _) = make_layout(mesh), prepared(model)
    assert layout is not None
    specs = {path: layout.parameter(fact.dims, fact.shape) for path, fact in state.facts.items()}
    shards = [
        prod(fact.shape) // (4 if "tensor" in specs[path] else 2) for path, fact in state.facts.items() if "fsdp" in specs[path]
    ]
    found = [e for e in collectives(program(model, mesh, accumulate=2, precision="bfloat16")) if e.axes == ("fsdp",)]
    exchanges = sorted((e.operation, e.received) for e in found if e.operation != "psum")
    assert exchanges == sorted([("all_gather", 2 * n) for n in shards] + [("reduce_scatter", 4 * n) for n in shards])
    assert {(e.times, e.scan) for e in found} == {(1, None)}


def test_one_device_along_fsdp_gathers_nothing() -> None:
    found = collectives(program(model_config("gpt"), once(data=2)))
    assert {e.operation for e in found} == {"psum"}


def test_when_it_gathers_is_one_of_two() -> None:
    with pytest.raises(ValueError, match=r"MeshConfig.fsdp_gather='part' is not known; choose one of layer, step"):
        MeshConfig(fsdp_gather="part")  # type: ignore[arg-type]
