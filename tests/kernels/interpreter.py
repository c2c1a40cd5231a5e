"""Triton kernels without a GPU: Triton's interpreter runs them on torch's CPU tensors, called back from compiled JAX programs.

Its product and its cast of bfloat16 are wrong (``test_the_interpreter_is_wrong_in_bfloat16`` notices when they are mended), so
only float32 and float16 are run.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.kernels import triton_call
from retro_jax.kernels.choice import lowering_for_gpu

torch = pytest.importorskip("torch", reason="Triton's interpreter runs on torch's tensors, which are not here")
pytest.importorskip("triton", reason="needs Triton")

KERNELS = "retro_jax.kernels"
ONE_AT_A_TIME = threading.Lock()  # the interpreter changes Triton while it runs


@contextmanager
def interpreted(*modules: str) -> Iterator[list[ModuleType]]:
    """Inside, ``implementation="triton"`` runs anywhere: these modules of ``retro_jax.kernels`` ("attention.triton") are replaced
    by copies whose kernels the interpreter runs.

    Triton decides when a function is decorated, of its own library too, so the copies are made with a copy of Triton.
    """
    kept = {name: module for name, module in sys.modules.items() if _is_copied(name, modules)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in modules:  # ``from package import module`` takes the package's attribute
            package, _, name = f"{KERNELS}.{module}".rpartition(".")
            patch.setattr(importlib.import_module(package), name, None, raising=False)
        for name in kept:
            del sys.modules[name]
        try:
            copies = [importlib.import_module(f"{KERNELS}.{module}") for module in modules]
        finally:
            for name in [name for name in sys.modules if _is_copied(name, modules)]:
                del sys.modules[name]
            sys.modules.update(kept)
        for copy in copies:
            patch.setitem(sys.modules, copy.__name__, copy)
            patch.setattr(copy, "call", call)
            patch.setattr(copy, "range", _range, raising=False)
        patch.setattr(triton_call, "unavailable", lambda: None)
        with lowering_for_gpu(90):
            yield copies


def _is_copied(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is Triton's, but for its compiled part, or one of ours."""
    triton_s = name.split(".")[0] == "triton" and not name.startswith("triton._C")
    return triton_s or name.removeprefix(f"{KERNELS}.") in modules


def call(
    kernel: Callable[..., Any],
    *inputs: jax.Array,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    aliases: Mapping[int, int] | None = None,
    num_warps: int = 4,
    num_stages: int = 1,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Stands for :func:`retro_jax.kernels.triton_call.call`. What a kernel does not write is NaN."""

    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
        tensors = [_tensor(np.array(array)) for array in arrays]
        results = [_tensor(np.full(each.shape, _unwritten(each.dtype), each.dtype)) for each in outputs]
        for number, over in (aliases or {}).items():
            assert (tensors[number].shape, tensors[number].dtype) == (results[over].shape, results[over].dtype)
            results[over] = tensors[number]
        with ONE_AT_A_TIME:
            kernel[grid](*tensors, *results, **constants)
        return tuple(_array(result) for result in results)

    results = jax.pure_callback(run, tuple(outputs), *inputs)
    return tuple(triton_call.varying(result, inputs) for result in results)


def _tensor(array: np.ndarray) -> Any:
    if array.dtype == jnp.bfloat16:  # NumPy and torch know no common one
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _range(*bounds: Any) -> range:
    """The interpreter cannot count to a tensor with NumPy 2.4 or newer."""
    return range(*(bound if isinstance(bound, int) else int(getattr(bound, "handle", bound).data.item()) for bound in bounds))


def _unwritten(dtype: Any) -> Any:
    return np.nan if jnp.issubdtype(dtype, jnp.floating) else 0
