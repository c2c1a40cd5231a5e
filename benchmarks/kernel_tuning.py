"""Times a Triton kernel with each of the tiles that its ``shapes.py`` names.

An operation that can be tuned has ``shapes.CANDIDATES``: under "forward" and "backward" the tiles (NamedTuples) to try, and in
``triton.py`` the functions ``forward_blocks`` and ``backward_blocks`` that choose them; these are replaced while a program is
traced. Forward tiles are timed by the forward pass; backward tiles by both passes, the forward tiles being those chosen.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.kernel_cases import BOTH, FORWARD, Case
from benchmarks.kernel_programs import Program, build, draw
from benchmarks.kernel_rounds import warmed
from benchmarks.kernel_sides import Side, ours
from benchmarks.reasons import reason_of
from benchmarks.timing import Timed, interleave, spread

ROUNDS = 7


def candidates(operation: str) -> Mapping[str, Any]:
    """The tiles to try, by pass; empty where the operation names none."""
    try:
        shapes = importlib.import_module(f"retro_jax.kernels.{operation}.shapes")
    except ModuleNotFoundError:
        return {}
    return getattr(shapes, "CANDIDATES", {})


def tune(case: Case, *, dtype: str, on_gpu: bool) -> dict[str, Any]:
    """By pass: median seconds of the tiles chosen by the kernel and of every candidate, and the best."""
    found = candidates(case.operation)
    result: dict[str, Any] = {"case": case.name, "operation": case.operation, "tuned": {}}
    if not found:
        return result | {"failed": f"{case.operation} names no candidates (shapes.CANDIDATES is not there)"}
    module = importlib.import_module(f"retro_jax.kernels.{case.operation}.triton")
    side = Side("triton", ours(case, "triton"), ours=True)
    for direction, which in (("forward", FORWARD), ("backward", BOTH)):
        problems = draw(case, which, dtype=dtype, on_gpu=on_gpu)
        timed: dict[str, Timed] = {}
        reasons: dict[str, str] = {}
        for blocks in (None, *found.get(direction, ())):
            name = "chosen" if blocks is None else _told(blocks)
            jax.clear_caches()  # traces that hold other tiles
            chooser = f"{direction}_blocks"
            given = getattr(module, chooser) if blocks is None else (lambda *_, blocks=blocks, **__: blocks)
            with mock.patch.object(module, chooser, given):
                program = build(case, [side], problems, which, dtype=dtype, on_gpu=on_gpu)["triton"]
            try:
                if not isinstance(program, Program):
                    raise program
                timed[name] = warmed(program, on_gpu)
            except Exception as error:  # too much shared memory, above all
                reasons[name] = reason_of(error)
        if timed:
            interleave(timed, ROUNDS)
        seconds = {name: spread(np.array(side.wall)) for name, side in timed.items()}
        best = min(seconds, key=lambda name: seconds[name]["median"], default=None)
        result["tuned"][direction] = {"best": best, "program_seconds": seconds, "did_not_run": reasons}
    return result


def _told(blocks: Any) -> str:
    named = blocks._asdict() if hasattr(blocks, "_asdict") else {"blocks": blocks}
    return " ".join(f"{name}={value}" for name, value in named.items())
