"""Programs that compute a case once or several times, ready to be timed.

A kernel of a few microseconds is over before the host has asked for the next, and inputs of a few megabytes stay in the GPU's
cache. So where a call moves little, a program computes the case for several sets of inputs, one after the other (a barrier lets
each begin when the one before it has ended, and keeps XLA from merging them), as many as pass through ``STREAMED`` bytes, which
no cache holds. A round asks for many programs and waits once, for the last: the host runs ahead of the device, so what is
timed is the device. Nothing is subtracted. PyTorch's calls are eager: where one takes less than about 50 microseconds, its host
may be what is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax

from benchmarks.kernel_cases import FORWARD, Case, Problem, jax_problem
from benchmarks.kernel_sides import Call, Side

# Three times an H100's second-level cache; at most MOST_SETS sets.
STREAMED, MOST_SETS = 160e6, 12


class Program(NamedTuple):
    """Computes a case for ``sets`` sets of inputs at each call. ``temporary`` bytes are held beside inputs and results."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    sets: int
    temporary: int | None = None


def sets_of(moved: float) -> int:
    """How many sets of inputs a program takes, for that many bytes a call."""
    return max(1, min(MOST_SETS, math.ceil(STREAMED / moved)))


def computed(call: Call, problem: Problem, which: str) -> Any:
    """The result; with the backward pass (result, gradients)."""
    if which == FORWARD:
        return call(problem.arrays, problem.given)
    result, vjp = jax.vjp(lambda *arrays: call(arrays, problem.given), *problem.arrays)
    return result, vjp(problem.cotangent)


def in_turn(call: Call, which: str, problems: Sequence[Problem]) -> list[Any]:
    """The results for several problems, none begun before the last is done."""
    results: list[Any] = []
    for problem in problems:
        if results:
            results[-1], problem = jax.lax.optimization_barrier((results[-1], problem))
        results.append(computed(call, problem, which))
    return results


def draw(case: Case, which: str, *, dtype: str, on_gpu: bool) -> list[Problem]:
    """The sets of inputs of a program for one pass."""
    cost = case.costs(jax.numpy.dtype(dtype).itemsize)[which]
    return [jax_problem(case, number, dtype) for number in range(sets_of(cost.bytes) if on_gpu else 1)]


def build(
    case: Case, sides: Sequence[Side], problems: list[Problem], which: str, *, dtype: str, on_gpu: bool
) -> dict[str, Program | Exception]:
    """A program a side, or why there is none; PyTorch draws as many sets of its own."""
    traced = [(partial(in_turn, side.call, which), problems) for side in sides if side.library == "jax"]
    compiled = iter(compile_all(traced, at_a_time=8 if on_gpu else 1))
    programs: dict[str, Program | Exception] = {}
    for side in sides:
        try:
            if side.library == "torch":
                programs[side.name] = _torch_program(case, side, which, len(problems), dtype, on_gpu)
                continue
            program = next(compiled)
            programs[side.name] = program if isinstance(program, Exception) else _jax_program(program, problems)
        except Exception as error:  # no GPU for PyTorch, no memory for its inputs: the other sides go on
            programs[side.name] = error
    return programs


def compile_all(traced: Sequence[tuple[Callable[[Any], Any], Any]], at_a_time: int) -> list[Any]:
    """Functions of one argument, with it, as compiled programs, or the errors that tell why not. They are traced one by one, for
    that is when Triton compiles its kernels; XLA compiles several at a time."""

    def lower(function: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return jax.jit(function).lower(argument)
        except Exception as error:  # an implementation that refuses, a kernel that does not compile
            return error

    def finish(lowered: Any) -> Any:
        try:
            return lowered if isinstance(lowered, Exception) else lowered.compile()
        except Exception as error:  # whatever a compiler may raise
            return error

    with ThreadPoolExecutor(at_a_time) as pool:
        return list(pool.map(finish, [lower(*one) for one in traced]))


def _jax_program(compiled: Any, problems: list[Problem]) -> Program:
    temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
    return Program(lambda: compiled(problems), jax.block_until_ready, len(problems), temporary)


def _torch_program(case: Case, side: Side, which: str, count: int, dtype: str, on_gpu: bool) -> Program:
    from benchmarks import torch_rivals

    device = torch_rivals.device(on_gpu)
    problems = [torch_rivals.random_problem(case, number, dtype, device) for number in range(count)]

    def call() -> Any:
        return [torch_rivals.run(side.call, problem, which) for problem in problems]

    return Program(call, torch_rivals.wait, count)
