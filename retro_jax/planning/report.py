"""A plan as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from retro_jax.config import resolved
from retro_jax.config.recompute import Action
from retro_jax.parallel.axes import AXES
from retro_jax.planning.activations import saved_by_layer, saved_bytes
from retro_jax.planning.compiled import CompiledStep
from retro_jax.planning.plan import Plan
from retro_jax.planning.program import Collective
from retro_jax.planning.target import Target

GIB = 2**30
STAYS: tuple[Action, Action] = ("save", "offload")


def print_plan(plan: Plan, target: Target, console: Console, compiled: CompiledStep | None = None) -> None:
    """Memory by kind, operations, exchanges and the time of each limit; with ``compiled`` XLA's own figures beside."""
    mesh = plan.config.mesh
    sizes = ", ".join(f"{axis} {size}" for axis in AXES if (size := getattr(mesh, axis)) > 1) or "one device"
    data = plan.config.data
    console.print(
        f"{plan.parameters:,} parameters, {data.batch_size} rows of {data.seq_len} tokens a step in "
        f"{plan.config.training.accumulate} parts, "
        f"{mesh.devices} x {target.name} ({sizes}), recompute '{plan.model.recompute}'"
    )
    table = Table("memory of a device", "")
    for kind, size in plan.memory.items():
        if size >= 1024:
            table.add_row(kind, in_bytes(size))
    table.add_section()
    table.add_row("in all, estimated", in_bytes(plan.total_memory))
    if compiled is not None:
        table.add_row("in all, as XLA compiled it", in_bytes(compiled.total_memory))
    table.add_row("there is", in_bytes(target.memory))
    console.print(table)
    saved = ", ".join(f"{kind} {in_bytes(size)}" for kind, size in plan.saved.items() if size)
    console.print(f"saved for the backward pass: {saved}")
    if plan.offloaded:
        console.print(f"in the host's memory: {in_bytes(plan.offloaded)} a device")
    _print_layers(plan, console)
    limits = Table("a step takes at least, by", "of a device", "")
    seconds = plan.seconds(target)
    received = {f"links of {axis}": plan.received(axis) for axis in AXES}
    for name, time in seconds.items():
        amount = f"{plan.hardware_flops / 1e12:,.2f} TFLOP" if name == "products" else ""
        limits.add_row(name, amount or (in_bytes(received[name]) if name in received else ""), in_seconds(time))
    console.print(limits)
    bound = max(seconds, key=seconds.__getitem__)
    longest = seconds[bound]
    if compiled is not None:
        print_exchanges(plan, compiled, console)
    again, most = plan.hardware_flops / plan.model_flops - 1, plan.model_flops / longest / target.flops
    computed = f"{again:.1%} more than the model's own are computed"
    if again < 0.0:
        computed = f"{-again:.1%} fewer than the model's own, which count hidden keys, are computed"
    console.print(
        f"The limit is {bound}: a step takes {in_seconds(longest)} or more, at most {most:.0%} MFU if all overlaps. Of products, "
        f"{computed}. A checkpoint is {in_bytes(plan.checkpoint)}."
    )


def print_exchanges(plan: Plan, compiled: CompiledStep, console: Console) -> None:
    """What a device receives in a step by the traced program and by XLA's, for each operation and axes."""
    table = Table("received in a step", "arrays", "as planned", "arrays", "as compiled")
    planned, real = received_by(plan.exchanges), received_by(compiled.exchanges)
    for operation, axes in sorted({*planned, *real}):
        row = [f"{operation} over {', '.join(axes)}"]
        for side in (planned, real):
            arrays, size = side.get((operation, axes), (0, 0))
            row += [f"{arrays:,}", in_bytes(size)]
        table.add_row(*row)
    console.print(table)
    console.print(f"Compiled in {compiled.seconds:.0f} s.")


def received_by(exchanges: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
    """Arrays and bytes of a step by operation and axes. All sums are "all_reduce": XLA joins those of equal axes into one."""
    found: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = {}
    for e in exchanges:
        key = ("all_reduce" if e.operation in ("psum", "pmax") else e.operation, e.axes)
        arrays, size = found.get(key, (0, 0))
        found[key] = arrays + e.times, size + e.times * e.received
    return found


def _print_layers(plan: Plan, console: Console) -> None:
    """What a layer of each kind saves on a device, by name; the arrays of several kinds stand in one row."""
    layers = saved_by_layer(plan.config, plan.model, by_chunks=plan.encodes_own_chunks)
    if not layers:
        return
    cells: dict[tuple[str, Action], dict[str, str]] = {}
    for kind, arrays in layers.items():
        for name, size, action in arrays:
            cells.setdefault((name, action), {})[kind] = in_bytes(size)
    table = Table("saved a layer", *layers, "")
    for (name, action), sizes in cells.items():
        if action != "recompute":
            table.add_row(name, *(sizes.get(kind, "") for kind in layers), action)
    table.add_section()
    on_device, on_host = ([saved_bytes(arrays, kept) for arrays in layers.values()] for kept in STAYS)
    table.add_row("in all on the device", *map(in_bytes, on_device), "")
    if any(on_host):
        table.add_row("in all in the host's memory", *map(in_bytes, on_host), "")
    if plan.encodes_own_chunks:
        console.print("each device along tensor encodes the neighbours of its own chunks, with weights gathered")
    again = sorted({name for name, action in cells if action == "recompute"})
    console.print(table)
    if again:
        console.print(f"computed again: {', '.join(again)}")


def in_bytes(size: float) -> str:
    """In the largest unit that leaves a whole number."""
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if size >= 1024**power:
            return f"{size / 1024**power:,.2f} {unit}"
    return f"{size:.0f} bytes"


def in_seconds(time: float) -> str:
    """In seconds, milliseconds or microseconds."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if time >= size:
            return f"{time / size:,.2f} {unit}"
    return f"{time / 1e-6:,.2f} us"


def plan_json(plan: Plan, target: Target, compiled: CompiledStep | None = None) -> dict[str, Any]:
    """All figures of a plan, in bytes, operations and seconds."""
    figures = {
        "target": target.name,
        "mesh": resolved(plan.config.mesh),
        "model": resolved(plan.model),
        "rows": plan.config.data.batch_size,
        "seq_len": plan.config.data.seq_len,
        "parameters": plan.parameters,
        "saved": plan.saved,
        "memory": {**plan.memory, "total": plan.total_memory, "offloaded": plan.offloaded, "target": int(target.memory)},
        "encoder": "chunks" if plan.encodes_own_chunks else "heads",
        "layers": {
            kind: [{"name": name, "bytes": size, "action": action} for name, size, action in arrays]
            for kind, arrays in saved_by_layer(plan.config, plan.model, by_chunks=plan.encodes_own_chunks).items()
        },
        "fits": plan.total_memory <= target.memory,
        "flops": {"model": plan.model_flops, "hardware": plan.hardware_flops},
        "exchanges": [dataclasses.asdict(exchange) for exchange in plan.exchanges],
        "seconds": plan.seconds(target),
        "checkpoint": plan.checkpoint,
    }
    if compiled is not None:
        figures["compiled"] = {
            "arguments": compiled.arguments,
            "temporary": compiled.temporary,
            "total": compiled.total_memory,
            "host": compiled.host,
            "exchanges": [
                {"operation": operation, "axes": list(axes), "arrays": arrays, "received": received}
                for (operation, axes), (arrays, received) in sorted(received_by(compiled.exchanges).items())
            ],
            "seconds": compiled.seconds,
        }
    return figures


def draw_plans(plans: list[Plan], target: Target, path: Path) -> None:
    """A bar a plan, stacked by kind of memory, under the line of what there is."""
    figure = Figure(figsize=(4.0 + 1.5 * len(plans), 4.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    names = [_name(plan) for plan in plans]
    bottoms = [0.0] * len(plans)
    for kind in plans[0].memory:
        heights = [plan.memory[kind] / GIB for plan in plans]
        axes.bar(names, heights, 0.6, bottom=bottoms, label=kind)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.axhline(target.memory / GIB, color="black", linestyle="--", linewidth=1, label=target.name)
    axes.set_ylabel("GiB of a device")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)


def _name(plan: Plan) -> str:
    mesh = plan.config.mesh
    sizes = [f"{axis} {size}" for axis in AXES if (size := getattr(mesh, axis)) > 1]
    return "\n".join([*(sizes or ["one device"]), plan.model.recompute])
