"""The nearest mesh and recomputation policy with which a model fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

from retro_jax.config import Config, MeshConfig, ModelConfig, RecomputePolicy
from retro_jax.errors import UserError
from retro_jax.planning.plan import Plan, held_bytes, make_plan
from retro_jax.planning.target import Target

POLICIES: tuple[RecomputePolicy, ...] = ("none", "selective", "full")
MOST_DEVICES = 4096


def nearest_that_fits(
    config: Config, model: ModelConfig, target: Target, tried: Callable[[MeshConfig, RecomputePolicy], None]
) -> Plan | None:
    """The first of :func:`candidates` that fits; None if none does.

    Args:
        config, model: what was asked for.
        target: how much memory there is.
        tried: called before a candidate is counted, which takes seconds.
    """
    for mesh, policy in candidates(config, target):
        try:
            other = on_mesh(config, mesh)
            changed = dataclasses.replace(model, recompute=policy, recompute_names=())
            if held_bytes(other, changed) > target.memory:
                continue
            tried(mesh, policy)
            plan = make_plan(other, changed)
        except (UserError, ValueError):  # it does not divide the model or the batch
            continue
        if plan.total_memory <= target.memory:
            return plan
    return None


def gathered_once(plan: Plan, target: Target) -> Plan | None:
    """The same step with parameters gathered over ``fsdp`` once; None where that does not fit or receives no less."""
    mesh = plan.config.mesh
    if mesh.fsdp == 1 or mesh.fsdp_gather == "step" or plan.config.training.accumulate == 1:
        return None
    config = dataclasses.replace(plan.config, mesh=dataclasses.replace(mesh, fsdp_gather="step"))
    if held_bytes(config, plan.model) > target.memory:
        return None
    once = make_plan(config, plan.model)
    return once if once.total_memory <= target.memory and once.received("fsdp") < plan.received("fsdp") else None


def on_mesh(config: Config, mesh: MeshConfig) -> Config:
    """The config on another mesh, its batch accumulated in as many parts as before, or in fewer where there are not so many rows.

    Raises:
        ValueError: the mesh does not divide the batch or its rows.
    """
    rows = config.data.batch_size // (mesh.data * mesh.fsdp)
    accumulate = max(part for part in range(1, max(1, min(rows, config.training.accumulate)) + 1) if rows % part == 0)
    return dataclasses.replace(config, mesh=mesh, training=dataclasses.replace(config.training, accumulate=accumulate))


def candidates(config: Config, target: Target) -> Iterator[tuple[MeshConfig, RecomputePolicy]]:
    """Meshes and policies, the nearest first: as many devices before more, less recomputation before more, the same ``tensor``
    before others, and then more devices along ``fsdp``. ``sequence`` stays, and ``tensor`` stays within a host."""
    now = config.mesh
    start = POLICIES.index(config.model.recompute) if config.model.recompute in POLICIES else 1
    devices = now.devices
    while devices <= MOST_DEVICES:
        for policy in POLICIES[start:]:
            meshes = [
                dataclasses.replace(now, data=devices // (fsdp * now.sequence * tensor), fsdp=fsdp, tensor=tensor)
                for tensor in _powers(target.devices_a_host)
                for fsdp in _powers(devices)
                if devices % (fsdp * now.sequence * tensor) == 0
            ]
            yield from ((mesh, policy) for mesh in sorted(meshes, key=partial(_distance, now)))
        devices *= 2


def _distance(now: MeshConfig, mesh: MeshConfig) -> tuple[int, bool, int]:
    return abs(mesh.tensor.bit_length() - now.tensor.bit_length()), mesh.fsdp < now.fsdp, mesh.fsdp


def _powers(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length()) if 2**n <= limit]
