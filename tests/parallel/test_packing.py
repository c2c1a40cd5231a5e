"""Chunks packed into places on every device: the same numbers on every kind of mesh."""

from __future__ import annotations

import numpy as np
import pytest

from retro_jax.config import MeshConfig
from tests.parallel.build import alone, assert_same, model_config, step

MESHES = [
    {"data": 2},
    {"fsdp": 2},
    {"tensor": 2},
    {"sequence": 2},
    {"sequence": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "sequence": 2, "tensor": 2},
]
QUICK = ({"sequence": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize(
    ("mesh", "policy", "accumulate"),
    [
        pytest.param(mesh, policy, accumulate, marks=() if (mesh in QUICK and policy == "selective") else pytest.mark.slow)
        for mesh in MESHES
        for policy, accumulate in (("none", 1), ("selective", 2), ("full", 1), ("offload", 1))
    ],
)
def test_a_step_is_that_of_one_device_without_places(mesh: dict, policy: str, accumulate: int) -> None:
    """Of 8 rows of 8 chunks 22 are read in all, on a device up to 14 of 16."""
    found = step(model_config("retro", recompute=policy), MeshConfig(**mesh), accumulate=accumulate, capacity=0.9)
    assert_same(found, alone(model_config("retro")))


def test_too_few_places_on_one_device_of_the_mesh_are_seen_in_the_loss() -> None:
    found = step(model_config("retro"), MeshConfig(data=4), capacity=0.4)
    assert np.isnan(found.loss)
