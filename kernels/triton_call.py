"""Triton kernels called from JAX: the one place that knows jax-triton, whose two APIs differ and whose calls have neither a rule
for ``vmap`` nor the types of ``shard_map``'s axes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from retro_jax.kernels.choice import gpu_capability, runs_on_gpu


def unavailable() -> str | None:
    """Why no Triton kernel can run in this process; None where they can."""
    if not runs_on_gpu():
        return "it needs a GPU"
    if find_spec("jax_triton") is None:
        return "jax-triton is not installed: pip install -e '.[gpu]'"
    return None


def refuses(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why Triton's attention cannot run these operands; None where it can."""
    width = q.shape[-1]
    if width % 16 or width > 256:
        return f"head_dim={width} is not a multiple of 16 up to 256"
    if q.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        return f"its dtype is {q.dtype}, not float32, float16 or bfloat16"
    return unavailable()


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
    """Launch a kernel.

    Args:
        kernel: a ``triton.jit`` function whose parameters are the inputs, all outputs, and constants by name.
        aliases: from an input's number to that of the output which takes its memory.
        grid: programs along each dim.
    """
    import jax_triton

    types = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"
    results = jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=gpu_capability(),
        input_output_aliases=dict(aliases or {}),
        **{types: tuple(outputs)},
        **constants,
    )
    return tuple(varying(result, inputs) for result in results)


def folds_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of arrays (or None) that all have the batch as their first dim, as its results do; an axis over which it is
    mapped is folded into the batch."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, is_mapped: Any, *arguments: Any) -> tuple[Any, Any]:
        def fold(array: jax.Array, own: bool) -> jax.Array:
            array = array if own else jnp.broadcast_to(array[None], (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        results = mapped(*jax.tree.map(fold, arguments, tuple(is_mapped)))
        results = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return mapped


def varying(result: jax.Array, inputs: Sequence[jax.Array]) -> jax.Array:
    """A kernel's result, with the mesh axes along which some input differs: without them ``shard_map`` silently sums a gradient
    over the mesh."""
    axes = set().union(*(getattr(getattr(jax.typeof(x), "mat", None), "varying", ()) for x in inputs))
    return jax.lax.pcast(result, tuple(axes), to="varying") if axes else result
