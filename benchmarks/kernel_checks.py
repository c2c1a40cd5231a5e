"""Is each side right? Values and gradients of small cases against the reference in float64: ours by the rule of the tests; a
rival, which may round where it likes, by whether it computes the same function at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cases import BOTH, Case, Problem, jax_problem
from benchmarks.kernel_programs import compile_all, computed
from benchmarks.kernel_sides import Call, Side, exact, our_sides, plain, rival_sides
from benchmarks.reasons import reason_of
from benchmarks.tolerance import FACTORS, largest_errors

# A rival's largest error as a share of the largest number.
SAME_FUNCTION = 0.02


def check(case: Case, *, dtype: str, on_gpu: bool) -> list[dict[str, Any]]:
    """A row a side: its largest errors as multiples of the plain computation's, and ``right``; or why it does not run, which
    is ``refused`` where it says so itself, by ValueError."""
    problem = jax_problem(case, 0, dtype)
    with jax.enable_x64(True):
        truth = jax.jit(_with_gradients(exact(case)))(jax.tree.map(_widened, problem))
        truth = jax.tree.map(np.asarray, truth)
    base = jax.jit(_with_gradients(plain(case)))(problem)
    sides = [*our_sides(case), *rival_sides(case, on_gpu)]
    traced = [(_with_gradients(side.call), problem) for side in sides if side.library == "jax"]
    programs = iter(compile_all(traced, at_a_time=8 if on_gpu else 1))
    rows = []
    for side in sides:
        program = next(programs) if side.library == "jax" else partial(_by_torch, side, on_gpu)
        row = {"operation": case.operation, "case": case.name, "side": side.name, "ours": side.ours}
        rows.append(row | _judged(program, side.ours, problem, base, truth))
    return rows


def _with_gradients(call: Call) -> Callable[[Problem], Any]:
    return lambda problem: computed(call, problem, BOTH)


def _by_torch(side: Side, on_gpu: bool, problem: Problem) -> Any:
    from benchmarks import torch_rivals

    result = torch_rivals.run(side.call, torch_rivals.same_problem(problem, torch_rivals.device(on_gpu)), BOTH)
    return jax.tree.map(lambda tensor: tensor.double().cpu().numpy(), result)


def _judged(program: Any, ours: bool, problem: Problem, base: Any, truth: Any) -> dict[str, Any]:
    try:
        if isinstance(program, Exception):
            raise program
        result = jax.tree.map(np.asarray, program(problem))
    except ValueError as error:
        return {"refused": reason_of(error)}
    except Exception as error:  # whatever a device may raise: the other sides go on
        return {"right": False, "failed": reason_of(error)}
    errors = {}
    for name, factor, found, plainly, truly in _compared(result, base, truth):
        largest, allowed = largest_errors(found, plainly, truly)
        assert allowed > 0.0, f"the plain computation of {name} is exact; the rule cannot fail"
        errors[name] = {
            "error": float(f"{largest:.3g}"), "times_plain": float(f"{largest / allowed:.3g}"), "at_most": factor,
            "share": float(f"{largest / np.abs(truly).max():.3g}"),
        }  # fmt: skip
    if ours:
        right = all(told["times_plain"] <= told["at_most"] for told in errors.values())  # NaN is not
    else:
        right = all(told["share"] <= SAME_FUNCTION for told in errors.values())
    return {"right": right, "errors": errors}


def _compared(*results: Any) -> list[tuple[Any, ...]]:
    """(name, factor, then that array of each result) for the result and each gradient."""
    arrays = [(result[0], *result[1]) for result in results]
    names = ("result", *(f"gradient {i}" for i in range(len(arrays[0]) - 1)))
    factors = (FACTORS["forward"], *[FACTORS["backward"]] * (len(names) - 1))
    return list(zip(names, factors, *arrays, strict=True))


def _widened(array: jax.Array) -> jax.Array:
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.asarray(np.asarray(array, np.float64)) if floating else array
