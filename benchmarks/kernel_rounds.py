"""Times a case: its sides and the ceilings in turn, round after round; the floor is that of the same rounds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.ceilings import Ceilings
from benchmarks.kernel_cases import FORWARD, PASSES, Case
from benchmarks.kernel_costs import Cost
from benchmarks.kernel_programs import Program, build, draw
from benchmarks.kernel_sides import Side
from benchmarks.reasons import reason_of
from benchmarks.timing import Timed, interleave, spread

# A side's share of a round lasts about this long on a GPU; on a CPU it is one call.
ROUND_SECONDS = 0.01
ROUNDS, FEWEST_ROUNDS = 20, 5


def measure(case: Case, sides: Sequence[Side], ceilings: Ceilings, *, dtype: str, on_gpu: bool, seconds: float) -> dict[str, Any]:
    """Both passes of a case, in about ``seconds`` where that many rounds suffice."""
    result: dict[str, Any] = {"case": case.name, "operation": case.operation, "settings": asdict(case), "dtype": dtype}  # type: ignore[call-overload]
    end = time.monotonic() + seconds
    passes = {}
    for which in PASSES:
        left = (end - time.monotonic()) / (3 if which == FORWARD else 1)
        passes[which] = measure_pass(case, sides, ceilings, which, dtype=dtype, on_gpu=on_gpu, seconds=left)
    return result | {"passes": passes}


def measure_pass(
    case: Case, sides: Sequence[Side], ceilings: Ceilings, which: str, *, dtype: str, on_gpu: bool, seconds: float
) -> dict[str, Any]:
    """One pass: the floor, figures a side, and how much faster ours is than each rival, round by round."""
    end = time.monotonic() + seconds
    problems = draw(case, which, dtype=dtype, on_gpu=on_gpu)
    programs = build(case, sides, problems, which, dtype=dtype, on_gpu=on_gpu)
    reasons = {name: reason_of(program) for name, program in programs.items() if isinstance(program, Exception)}
    timed: dict[str, Timed] = {}
    for name, program in programs.items():
        if isinstance(program, Program):
            try:
                timed[name] = warmed(program, on_gpu)
            except Exception as error:  # out of memory, above all
                reasons[name] = reason_of(error)
    a_round = sum(side.wall[-1] * side.calls for side in timed.values())
    rounds = int(np.clip((end - time.monotonic()) / max(a_round, 1e-9), FEWEST_ROUNDS, ROUNDS))
    limits = ceilings.timed()
    interleave({**timed, **{f"ceiling: {name}": side for name, side in limits.items()}}, rounds)

    measured = {name: float(np.median(rate)) for name, rate in ceilings.rates(limits).items()}
    rates = measured["flops_a_second"], measured["bytes_a_second"]
    cost = case.costs(jnp.dtype(dtype).itemsize)[which]
    walls = {name: np.array(side.wall) / programs[name].sets for name, side in timed.items()}  # type: ignore[union-attr]
    mine = [side.name for side in sides if side.ours and side.name in walls]
    rivals = [side.name for side in sides if not side.ours and side.name in walls]
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "ceilings": {name: float(f"{rate:.4g}") for name, rate in measured.items()},
        "floor_seconds": float(f"{cost.floor(*rates):.4g}"),
        "limit": cost.limit(*rates),
        "rounds": rounds,
        "sides": {
            side.name: {"ours": side.ours, **figures(cost, walls[side.name], rates, timed[side.name], programs[side.name])}
            for side in sides
            if side.name in walls
        },
        "ours_is_faster": {name: {rival: spread(walls[rival] / walls[name]) for rival in rivals} for name in mine},
        "did_not_run": reasons,
    }


def warmed(program: Program, on_gpu: bool) -> Timed:
    """A side that has been called, with as many calls a round as last ROUND_SECONDS on a GPU."""
    side = Timed(program.call, 1, program.wait)
    side.round()
    side.calls = 3 if on_gpu else 1
    side.round()
    if on_gpu:
        side.calls = int(np.clip(ROUND_SECONDS / side.wall[-1], 1, 1000))
    return side


def figures(cost: Cost, wall: np.ndarray, rates: tuple[float, float], side: Timed, program: Any) -> dict[str, Any]:
    """Of one side: seconds a call, rates by the formulas, and the floor as a share of its time."""
    median = float(np.median(wall))
    return {
        "seconds": spread(wall),
        "tflops": float(f"{cost.flops / median / 1e12:.4g}"),
        "gigabytes_a_second": float(f"{cost.bytes / median / 1e9:.4g}"),
        "of_floor": float(f"{cost.floor(*rates) / median:.3g}"),
        "calls_a_round": side.calls * program.sets,
        "sets": program.sets,
        "temporary_bytes": program.temporary,
    }
