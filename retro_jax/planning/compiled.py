"""The true program of a step for GPUs that are not there: XLA compiles it for a described accelerator, on a machine without any.

Needs JAX's CUDA plugin and libraries (the extra ``cuda``), no GPU. What comes back is what XLA decided: bytes of memory, and the
exchanges between devices that stand in its program.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod

import jax
import numpy as np
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from retro_jax.config import Config, MeshConfig, ModelConfig
from retro_jax.errors import UserError
from retro_jax.kernels.choice import lowering_for_gpu
from retro_jax.parallel.axes import AXES
from retro_jax.parallel.layout import Layout
from retro_jax.planning.plan import traceable_step
from retro_jax.planning.program import BACKWARD, FORWARD, Collective, received_bytes
from retro_jax.planning.target import Target

# The names of XLA's operations, as JAX calls them.
OPERATIONS = {
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-reduce": "all_reduce",
    "collective-permute": "ppermute",
    "all-to-all": "all_to_all",
}
BYTES = {"pred": 1, "bf16": 2} | {f"{kind}{bits}": bits // 8 for kind in "sfu" for bits in (8, 16, 32, 64)}


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What XLA made of a step, for each device: bytes of its ``arguments`` (state and batch) and of the ``temporary`` arrays, of
    host memory, the exchanges, and how long it took to compile."""

    arguments: int
    temporary: int
    host: int
    exchanges: tuple[Collective, ...]
    seconds: float

    @property
    def total_memory(self) -> int:
        """Bytes on the device; results take their arguments' place."""
        return self.arguments + self.temporary


def can_compile() -> bool:
    """Whether JAX's plugin and CUDA's libraries are there."""
    return None not in (find_spec("nvidia"), find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13"))


def compile_step(config: Config, model: ModelConfig, target: Target) -> CompiledStep:
    """Compile the training step for as many accelerators as the mesh has.

    Raises:
        UserError: the CUDA extra is not installed, or the mesh does not divide the model.
    """
    if not can_compile():
        raise UserError("compiling for GPUs needs JAX's CUDA libraries (no GPU): pip install -e '.[cuda]'")
    layout = Layout(config.mesh, described_mesh(config.mesh, target))
    step, arguments = traceable_step(config, model, layout)
    start = time.monotonic()
    with lowering_for_gpu(10 * target.capability):
        compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    seconds = time.monotonic() - start
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats is not None and text is not None
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return CompiledStep(
        arguments=stats.argument_size_in_bytes,
        temporary=stats.temp_size_in_bytes + fresh,
        host=stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes,
        exchanges=tuple(compiled_collectives(text, config.mesh)),
        seconds=seconds,
    )


def compiled_collectives(text: str, mesh: MeshConfig) -> list[Collective]:
    """All exchanges of an XLA program, one for each array, in the order of the program.

    Args:
        text: the program of one device, optimised.
        mesh: its devices, numbered in the order of the axes.

    Raises:
        ValueError: a loop around an exchange runs an unknown number of times.
    """
    computations, entry = _computations(text)
    return list(_exchanges(computations, entry, 1, None, mesh))


def described_mesh(config: MeshConfig, target: Target) -> Mesh:
    """A mesh of accelerators that are described only.

    Raises:
        UserError: the devices do not fill hosts.
    """
    devices = config.devices
    hosts, on_host = max(1, devices // target.devices_a_host), min(devices, target.devices_a_host)
    if hosts * on_host != devices:
        raise UserError(f"{devices} devices do not fill hosts of {target.devices_a_host}; choose another mesh")
    with _cuda_without_gpu():
        topology = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{hosts}x{on_host}", target_config=target.description
        )
    grid = np.array(topology.devices).reshape([getattr(config, axis) for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


@contextmanager
def _cuda_without_gpu() -> Iterator[None]:
    """JAX loads its plugin and knows the platform "cuda" where there is none."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    known = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda platform: platform if platform == "cuda" else known(platform)
    try:
        yield
    finally:
        xla_bridge.canonicalize_platform = known


# Lines of XLA's text: a computation's first; an exchange, with the shapes of what it gives before its name; the computations that
# a line calls; how often a loop runs; an array's type; groups of devices in three notations.
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_EXCHANGE = re.compile(rf" = (.*?) ({'|'.join(OPERATIONS)})(-start)?\(")
_CALLED = re.compile(r"\b(?:body|calls|branch_computations|true_computation|false_computation)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")
_TIMES = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_IOTA = re.compile(r"(?:replica_groups|collective_device_list)=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_GROUP = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation that call others or exchange something, and the name of the first computation."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name and (_CALLED.search(line) or _EXCHANGE.search(line)):
            computations[name].append(line)
    return computations, entry


def _exchanges(
    computations: dict[str, list[str]], name: str, times: int, scan: str | None, mesh: MeshConfig
) -> Iterator[Collective]:
    for line in computations[name]:
        if found := _EXCHANGE.search(line):
            yield from _exchange(found, line, times, scan, mesh)
            continue
        inner_times, inner_scan = times, scan
        called = [each.strip(" %") for names in _CALLED.findall(line) for each in names.split(",") if each.strip()]
        if " while(" in line:
            # An autodiff transpose is the backward pass.
            inner_scan = BACKWARD if "transpose(" in line else FORWARD
            known = _TIMES.search(line)
            if known is None and any(True for each in called for _ in _exchanges(computations, each, 1, None, mesh)):
                raise ValueError(f"the loop {called} exchanges something and runs an unknown number of times")
            inner_times = times * int(known[1]) if known else 0
        for each in called:
            yield from _exchanges(computations, each, inner_times, inner_scan, mesh)


def _exchange(found: re.Match[str], line: str, times: int, scan: str | None, mesh: MeshConfig) -> Iterator[Collective]:
    axes = _axes(line, mesh)
    devices = prod(getattr(mesh, axis) for axis in axes)
    operation, started = OPERATIONS[found[2]], found[3] is not None
    arrays = [prod(int(size) for size in sizes.split(",") if size) * BYTES[kind] for kind, sizes in _ARRAY.findall(found[1])]
    if found[1].startswith("((") or (started and operation != "all_reduce"):
        arrays = arrays[: len(arrays) // 2]  # what is given stands before what is received
    elif operation == "all_gather":
        arrays = [size // devices for size in arrays]
    elif operation == "reduce_scatter":
        arrays = [size * devices for size in arrays]
    for given in arrays:
        received = received_bytes(operation, given, devices)
        yield Collective(operation=operation, axes=axes, received=received, times=times, scan=scan)


def _axes(line: str, mesh: MeshConfig) -> tuple[str, ...]:
    """Along which axes the devices lie that exchange something with each other."""
    shape = tuple(getattr(mesh, axis) for axis in AXES)
    places = zip(*(np.unravel_index(device, shape) for device in _first_group(line, mesh.devices)), strict=True)
    return tuple(axis for axis, at in zip(AXES, places, strict=True) if len(set(at)) > 1)


def _first_group(line: str, devices: int) -> list[int]:
    """The devices of the first group that exchange something with each other."""
    if named := _NAMED.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        numbers = np.arange(devices).reshape(list(sizes.values()))
        return list(numbers[tuple(slice(None) if f"'{name}'" in named[2] else 0 for name in sizes)].ravel())
    if iota := _IOTA.search(line):
        shape, reshaped, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        numbers = np.arange(devices).reshape(reshaped)
        return list(numbers.transpose(order).reshape(shape)[0]) if order else list(numbers.reshape(shape)[0])
    listed = _GROUP.search(line)
    return [int(device) for device in listed[1].split(",")] if listed else list(range(devices))
