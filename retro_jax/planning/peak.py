"""The moment of a traced program at which a device holds the most, and what it holds then.

The program is walked in its order, by the rules by which XLA for GPUs allocates. A matrix product, an exchange and a loop read
arrays that are written to memory, and write their results there; so does a sum its result. What is computed element by element is
computed where it is read, unless one of those reads it: until then what it is computed from is held instead. The stacks that a
loop writes exist from its beginning, what it carries is replaced in place, and an array takes the place of an equally large one
that is read for the last time to compute it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from retro_jax.planning.program import inner_jaxprs

# What another operation reads without that it is written first.
VIEWS = {"reshape", "squeeze", "expand_dims", "transpose", "optimization_barrier", "name", "copy", "copy_p", "reshard"}
# What reads memory and writes its results there.
WRITTEN = {
    "dot_general", "all_gather", "reduce_scatter", "psum", "pmax", "ppermute", "gather", "scatter", "scatter-add", "scan", "sort",
    "cumsum", "device_put",
}  # fmt: skip
SUMS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"}

PARAMETERS = "parameters"
COPY, GRADIENTS, ACTIVATIONS, WORKSPACE = "compute copy", "gradients", "activations", "workspace"
OUTSIDE = "outside"


@dataclass(eq=False)
class _Buffer:
    """Bytes that are held from the operation ``first`` to ``last``. ``in_place``: they may take another buffer's place.
    ``readers``: what is computed from them element by element, by where and how many bytes."""

    size: int
    first: int
    last: int
    kind: str = WORKSPACE
    in_place: bool = False
    readers: list[tuple[int, int]] = field(default_factory=list)


@dataclass(eq=False)
class _Value:
    """An array of the program: its bytes on a device, the kinds of arguments that it depends on, and the buffers that hold it or
    what it is computed from. ``written``: something reads it from memory. ``placed``: it is a result that is written where it
    belongs and read by nothing else. ``source``: what it is a view of."""

    size: int
    of: frozenset[str] = frozenset()
    buffers: list[_Buffer] = field(default_factory=list)
    written: bool = False
    placed: bool = False
    source: _Value | None = None


@dataclass(eq=False)
class _Operation:
    """One equation, of the backward pass or not; ``inside`` a ``shard_map``, where shapes are those of one device."""

    name: str
    inputs: list[_Value]
    outputs: list[_Value]
    backward: bool
    inside: bool
    equation: JaxprEqn


def peak_memory(program: ClosedJaxpr, kinds: Sequence[str]) -> Counter[str]:
    """Bytes by kind at the moment when they are the most.

    Args:
        program: one step. Its results take the place of the arguments.
        kinds: what each argument is; what is computed from :data:`PARAMETERS` alone is the compute copy.
    """
    arguments = [
        _Value(_bytes(var.aval, inside=False), frozenset({kind}), [_Buffer(_bytes(var.aval, inside=False), 0, 0, kind)])
        for var, kind in zip(program.jaxpr.invars, kinds, strict=True)
    ]
    peak = _peak(program.jaxpr, arguments, inside=False, backward=False, results=0)
    for value in arguments:
        peak[value.buffers[0].kind] += value.size
    return peak


def _peak(jaxpr: Jaxpr, arguments: list[_Value], *, inside: bool, backward: bool, results: int | None) -> Counter[str]:
    """What is held at the worst moment beside the arguments.

    Args:
        results: how many of the results stay until the end; the others are written where they belong at once. None: all.
    """
    operations: list[_Operation] = []
    gradients: list[_Value] = []
    outputs = _flatten(jaxpr, arguments, operations, gradients, inside=inside, backward=backward)
    kept = outputs[: len(outputs) if results is None else results]
    for operation in reversed(operations):
        if operation.name in WRITTEN:
            for value in operation.inputs:
                _write(value)
    for value in outputs[len(kept) :]:
        value.placed = not value.written
    for value in outputs:
        _write(value)
    buffers: list[_Buffer] = []
    inner: list[Counter[str]] = []
    for place, operation in enumerate(operations):
        inner.append(_scan_peak(operation) if operation.name == "scan" else Counter())
        _allocate(operation, place, buffers)
    end = len(operations)
    for value in kept:
        for buffer in value.buffers:
            buffer.last = end
    if {operation.backward for operation in operations} == {False, True}:
        gradients += kept
    _name_kinds(buffers, operations, gradients, end)
    return _most(buffers, inner)


def _flatten(
    jaxpr: Jaxpr,
    arguments: list[_Value],
    operations: list[_Operation],
    gradients: list[_Value],
    *,
    inside: bool,
    backward: bool,
) -> list[_Value]:
    """Append the operations of a program and of all that it calls, and what it computes on devices; returns its results."""
    values: dict[Var, _Value] = dict(zip(jaxpr.invars, arguments, strict=True))
    for var in jaxpr.constvars:
        values[var] = _Value(0)

    def read(atom: Any) -> _Value:
        return _Value(0) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, [read(atom) for atom in equation.invars]
        back = backward or "transpose(" in str(equation.source_info.name_stack)
        called = inner_jaxprs(equation.params)
        if name == "cond":
            called, inputs = called[-1:], inputs[1:]  # of what depends on the platform the last is for any
        if name not in WRITTEN and len(called) == 1 and len(called[0].invars) == len(inputs):
            results = _flatten(called[0], inputs, operations, gradients, inside=inside or name == "shard_map", backward=back)
            if name == "shard_map":
                gradients += results
        else:
            of = frozenset().union(*(value.of for value in inputs))
            results = [_Value(_bytes(var.aval, inside=inside), of) for var in equation.outvars]
            if name in VIEWS:
                for result, value in zip(results, inputs, strict=False):
                    result.source = value
            operations.append(_Operation(name, inputs, results, back, inside, equation))
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _write(value: _Value) -> None:
    """The value is read from memory: it is written there, or what it is a view of."""
    while not value.written:
        value.written = True
        if value.source is None:
            break
        value = value.source


def _allocate(operation: _Operation, place: int, buffers: list[_Buffer]) -> None:
    """Give the results of an operation their buffers, and note that those of its inputs are read here."""
    name, inputs = operation.name, operation.inputs
    if name in VIEWS:
        for result, value in zip(operation.outputs, inputs, strict=False):
            result.buffers = value.buffers
        return
    held = list({id(buffer): buffer for value in inputs for buffer in value.buffers}.values())
    fused = name not in WRITTEN and name not in SUMS and not any(result.written for result in operation.outputs)
    if fused:
        for result in operation.outputs:
            result.buffers = held
        return
    computed = name not in WRITTEN and name not in SUMS
    if computed:
        place = _together(held, place, operation.outputs[0].size)
    for buffer in held:
        buffer.last = max(buffer.last, place)
    carried = _carried(operation.equation) if name == "scan" else 0
    for number, result in enumerate(operation.outputs):
        size = 0 if result.placed and computed else result.size
        result.buffers = [_Buffer(size, place, place, in_place=computed or name == "psum" or number < carried)]
        buffers.extend(result.buffers)


def _together(held: list[_Buffer], place: int, size: int) -> int:
    """Where something is computed element by element: with an earlier one of its size that reads the same, if all is there."""
    earlier = [at for buffer in held for at, other in buffer.readers if other == size]
    together = min((at for at in earlier if all(buffer.first < at for buffer in held)), default=place)
    for buffer in held:
        buffer.readers.append((together, size))
    return together


def _scan_peak(operation: _Operation) -> Counter[str]:
    """What one run of a loop's body holds beside what the loop was given and gives."""
    body: Jaxpr = operation.equation.params["jaxpr"].jaxpr
    arguments = []
    for var, given, value in zip(body.invars, operation.equation.invars, operation.inputs, strict=True):
        is_stack = given.aval.ndim > var.aval.ndim  # type: ignore[attr-defined]  # of which a slice is read
        buffers = [] if is_stack else [_Buffer(value.size, 0, 0, OUTSIDE)]
        arguments.append(_Value(_bytes(var.aval, inside=operation.inside), value.of, buffers))
    carried = _carried(operation.equation)
    return _peak(body, arguments, inside=operation.inside, backward=operation.backward, results=carried)


def _carried(scan: JaxprEqn) -> int:
    """How many of a loop's results are carried; the others are stacks, of a dim more than in its body."""
    results = zip(scan.params["jaxpr"].jaxpr.outvars, scan.outvars, strict=True)
    return sum(inner.aval.ndim == outer.aval.ndim for inner, outer in results)  # type: ignore[attr-defined]


def _name_kinds(buffers: list[_Buffer], operations: list[_Operation], gradients: list[_Value], end: int) -> None:
    """What is computed from parameters alone is their copy to compute with; what the backward pass reads of the forward pass are
    activations."""
    copies = {id(buffer) for op in operations for value in op.outputs if value.of == {PARAMETERS} for buffer in value.buffers}
    of_gradients = set(map(id, gradients))
    for operation in reversed(operations):
        if operation.name in ("psum", "reduce_scatter") and not of_gradients.isdisjoint(map(id, operation.outputs)):
            gradients = gradients + operation.inputs  # before they are summed over devices
            of_gradients |= set(map(id, operation.inputs))
    sums = {id(buffer) for value in gradients for buffer in value.buffers}
    for buffer in buffers:
        if id(buffer) in copies:
            buffer.kind = COPY
        elif id(buffer) in sums:
            buffer.kind = GRADIENTS
        elif buffer.last < end and operations[buffer.last].backward > operations[buffer.first].backward:
            buffer.kind = ACTIVATIONS


def _most(buffers: list[_Buffer], beside: list[Counter[str]]) -> Counter[str]:
    """What is held at the worst operation: the buffers that are alive, and what a loop's body holds ``beside`` them."""
    begin: dict[int, list[_Buffer]] = {}
    done: dict[int, list[_Buffer]] = {}
    for buffer in buffers:
        begin.setdefault(buffer.first, []).append(buffer)
        done.setdefault(buffer.last, []).append(buffer)
    held: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for place, inner in enumerate(beside):
        ending = done.get(place, [])
        replaceable = [buffer for buffer in ending if buffer.first < place]
        now = Counter(inner)
        for buffer in begin.get(place, []):
            held[buffer.kind] += buffer.size
            old = next((old for old in replaceable if old.size == buffer.size), None) if buffer.in_place else None
            if old is not None:
                replaceable.remove(old)
                now[old.kind] -= old.size
        now.update(held)
        if now.total() > most.total():
            most = now
        for buffer in ending:
            held[buffer.kind] -= buffer.size
    return most


def _bytes(aval: Any, *, inside: bool) -> int:
    """Bytes of an array on a device; what lies in the host's memory takes none."""
    if not hasattr(aval, "shape") or "host" in str(getattr(aval, "memory_space", "")).lower():
        return 0
    itemsize = getattr(aval.dtype, "itemsize", 4)
    return prod(aval.shape if inside else aval.sharding.shard_shape(aval.shape)) * itemsize
