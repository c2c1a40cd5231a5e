"""Triton kernels on a CPU: a fresh copy of their module, made for Triton's interpreter, called from a JAX program.

The interpreter's bfloat16 is wrong (its casts truncate, its products multiply raw bits): float32 and float16 only.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

# The devices of a mesh call at the same time, and the interpreter changes Triton's modules while it runs.
_LOCK = threading.Lock()


def interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``name`` with its kernels made for the interpreter; until the test ends, who imports it gets this one.

    The module calls its kernels by ``triton_call.call``.
    """
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    from triton import knobs

    spec = find_spec(name)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    with monkeypatch.context() as while_it_is_made:
        while_it_is_made.setattr(knobs.runtime, "interpret", True)
        spec.loader.exec_module(module)
    module.triton_call = SimpleNamespace(call=call)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return module


def call(
    kernel: Any,
    *inputs: jax.Array,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    aliases: Mapping[int, int] | None = None,
    num_warps: int = 4,
    num_stages: int = 1,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """``retro_jax.kernels.triton_call.call`` by the interpreter. What a kernel leaves unwritten is NaN or a negative number."""
    import torch

    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
        given = [torch.from_numpy(np.array(array)) for array in arrays]
        results = [torch.from_numpy(np.full(each.shape, _unwritten(each.dtype), each.dtype)) for each in outputs]
        for input_number, output_number in (aliases or {}).items():
            assert given[input_number].shape == results[output_number].shape
            assert given[input_number].dtype == results[output_number].dtype
            results[output_number] = given[input_number]
        with _LOCK, _interpreted_language():
            kernel[grid](*given, *results, **constants)
        return tuple(result.numpy() for result in results)

    return tuple(jax.pure_callback(run, tuple(outputs), *inputs))


def _unwritten(dtype: Any) -> float:
    return np.nan if np.issubdtype(dtype, np.floating) else -(2**15)


@contextmanager
def _interpreted_language() -> Iterator[None]:
    """Functions that Triton writes in its own language (``tl.sum``) are interpreted, too; and afterwards all is as it was, so
    that kernels can be compiled: the interpreter leaves behind what it does to ``tl.core`` for them."""
    import triton.experimental.gluon  # noqa: F401  the interpreter imports it, and it must not see what is interpreted
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    changed = (tl, tl.core, tl.math, tl.standard, tl.core.tensor, tl.core.tensor_descriptor_base)
    before = [dict(vars(each)) for each in changed]
    try:
        for each in (tl, tl.standard):
            for name, member in list(vars(each).items()):
                if isinstance(member, JITFunction):
                    setattr(each, name, InterpretedFunction(member.fn))
        yield
    finally:
        for each, was in zip(changed, before, strict=True):
            for name, member in list(vars(each).items()):
                if name in was and member is not was[name]:
                    setattr(each, name, was[name])
                elif name not in was and isinstance(each, type):  # what a module got is used by the functions kept for next time
                    delattr(each, name)
