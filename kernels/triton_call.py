"""How a Triton kernel becomes an operation of a JAX program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax


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
    """Run ``kernel`` on a GPU. Its parameters are the inputs, then the outputs, then the constants by name.

    Args:
        kernel: a ``triton.jit`` function.
        inputs: arrays.
        outputs: shape and dtype of each.
        grid: how many programs, along at most three axes.
        aliases: from an input's number to that of the output which takes its memory.
        num_warps, num_stages: Triton's.
        constants: the kernel's ``tl.constexpr`` parameters.
    """
    import jax_triton  # raises without a GPU's plugin

    # 0.4 renamed it.
    name = "out_shape" if "out_shape" in inspect.signature(jax_triton.triton_call).parameters else "out_type"
    results = jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        grid=grid,
        input_output_aliases=dict(aliases or {}),
        num_warps=num_warps,
        num_stages=num_stages,
        **{name: tuple(outputs)},
        **constants,
    )
    return tuple(results)
