"""What a traced program does on one device: its matrix products and what it receives from other devices.

Both are counted in the jaxpr, before any compiler: under ``jax.shard_map`` shapes are those of one device's parts, and every
collective is one that the program states. Loops count as often as they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

COLLECTIVES = ("all_gather", "reduce_scatter", "psum", "pmax", "ppermute")
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange between devices.

    ``received`` bytes reach each device each time; the whole runs ``times`` times. ``scan`` is "forward" or "backward" inside a
    scan over layers (or chunks of the loss), by its direction, and None outside of all.
    """

    operation: str
    axes: tuple[str, ...]
    received: int
    times: int
    scan: str | None


def collectives(program: ClosedJaxpr) -> list[Collective]:
    """All exchanges of a program, in its order."""
    found = []
    for equation, times, scan, sizes in _equations(program.jaxpr, 1, None, {}):
        name = equation.primitive.name
        if name in COLLECTIVES:
            given: Any = equation.params["axes" if "axes" in equation.params else "axis_name"]
            axes = (given,) if isinstance(given, str) else tuple(given)
            devices = prod(sizes[axis] for axis in axes)
            n = sum(v.aval.size * v.aval.dtype.itemsize for v in equation.invars)  # type: ignore[attr-defined]
            found.append(Collective(operation=name, axes=axes, received=received_bytes(name, n, devices), times=times, scan=scan))
    return found


def product_flops(program: ClosedJaxpr) -> int:
    """2 M N K over all matrix products that one device computes."""
    total = 0
    for equation, times, _, _ in _equations(program.jaxpr, 1, None, {}):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape  # type: ignore[attr-defined]
            result = equation.outvars[0].aval.shape  # type: ignore[attr-defined]
            total += times * 2 * prod(result) * prod(left[dim] for dim in contracted)
    return total


class SavedBytes(NamedTuple):
    """Bytes that wait for the backward pass, on the device and in the host's memory."""

    device: int
    host: int


def saved_inside(program: ClosedJaxpr) -> SavedBytes:
    """What one device saves beside what it was given.

    Args:
        program: its results are what a forward pass leaves for its backward pass; it may stand whole in one ``shard_map``.
    """
    mapped = [equation for equation in program.jaxpr.eqns if equation.primitive.name == "shard_map"]
    assert len(mapped) <= 1, "only one shard_map around the whole program is looked into"
    inside = mapped[0].params["jaxpr"] if mapped else program.jaxpr
    arrays = {v for v in inside.outvars if isinstance(v, Var)} - {*inside.invars, *inside.constvars}
    sizes = {"device": 0, "host": 0}
    for array in arrays:
        place = "host" if "host" in str(array.aval.memory_space).lower() else "device"  # type: ignore[attr-defined]
        sizes[place] += array.aval.size * array.aval.dtype.itemsize  # type: ignore[attr-defined]
    return SavedBytes(**sizes)


def received_bytes(operation: str, n: int, devices: int) -> int:
    """Bytes that reach a device that gives n bytes, by rings as NCCL sends them.

    Args:
        operation: "all_gather", "reduce_scatter", "ppermute", "all_to_all", or another, which sums.
    """
    if operation == "all_gather":
        return (devices - 1) * n
    if operation in ("reduce_scatter", "all_to_all"):
        return (devices - 1) * n // devices
    if operation == "ppermute":
        return n
    return 2 * (devices - 1) * n // devices


def _equations(
    jaxpr: Jaxpr, times: int, scan: str | None, sizes: dict[str, int]
) -> Iterator[tuple[JaxprEqn, int, str | None, dict[str, int]]]:
    """Every equation with how often it runs, the direction of the scan that it stands in, and the sizes of the mesh's axes."""
    for equation in jaxpr.eqns:
        yield equation, times, scan, sizes
        name, params = equation.primitive.name, equation.params
        inner_times, inner_scan, inner_sizes = times, scan, sizes
        if name == "scan":
            inner_times *= params["length"]
            inner_scan = BACKWARD if params["reverse"] else FORWARD
        elif name == "shard_map":
            inner_sizes = dict(params["mesh"].shape)
        elif name == "while":
            raise ValueError("a while loop runs an unknown number of times; only scans can be counted")
        inner = inner_jaxprs(params)
        for part in inner[-1:] if name == "cond" else inner:  # of what depends on the platform the last is for any
            yield from _equations(part, inner_times, inner_scan, inner_sizes)


def inner_jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    """The programs that an equation calls."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found
