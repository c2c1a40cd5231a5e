"""What the compiler makes of every Triton kernel at the published shapes: registers, spills and shared memory on A100 and H100.

No GPU is needed. The calls are those of the operations themselves, forward and backward, with the tiles that they would take.

    python -m benchmarks.kernel_resources [--write docs/kernels.md]

With ``--write`` the table between the lines "<!-- kernel resources -->" of a file is replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from retro_jax.kernels import attention, chunked_cross_attention, compiled, triton_call
from retro_jax.kernels.attention import shapes as attention_shapes
from retro_jax.kernels.choice import lowering_for_gpu
from retro_jax.kernels.chunked_cross_attention import shapes as cca_shapes

SHARED = {80: 166_912, 90: 232_448}  # bytes that a program can have
NAMES = {80: "A100", 90: "H100"}
MARK = "<!-- kernel resources -->"
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32", "bool": "*i1"}


class Launch(NamedTuple):
    """One kernel as an operation calls it."""

    case: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def report(self, capability: int) -> compiled.Report:
        """What the compiler makes of it."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return compiled.report(self.kernel, self.signature, self.constants, capability=capability, **options)


def launches(capability: int, dtype: Any = jnp.bfloat16) -> list[Launch]:
    """Every kernel at every published shape, as it is called on a GPU of this compute capability."""
    with mock.patch.object(triton_call, "unavailable", return_value=None), lowering_for_gpu(capability):
        return list(_launches(dtype))


def _launches(dtype: Any) -> Iterator[Launch]:
    for shape in cca_shapes.PUBLISHED:
        B, T, L, C, S, N, G, H = shape
        case = f"CCA, {N} heads of {H}, {N // G} a group, {S} keys"
        q, kv, mask = _array((B, T, N, H), dtype), _array((B, L, S, G, H), dtype), _array((B, L, S), bool)
        yield from _recorded(
            case,
            lambda q, k, v, mask, C=C: chunked_cross_attention.chunked_cross_attention(
                q, k, v, mask, chunk_len=C, implementation="triton"
            ),
            (q, kv, kv),
            mask,
        )
    for name, X, Q, S, N, H in (("encoder", 512, 128, 128, 16, 128), ("encoder's cross-attention", 256, 256, 64, 16, 128)):
        q, kv, mask = _array((X, Q, N, H), dtype), _array((X, S, N, H), dtype), _array((X, S), bool)
        yield from _recorded(
            f"{name}, {Q} queries, {S} keys, heads of {H}",
            lambda q, k, v, mask: attention.attention(q, k, v, attention.KeyMask(mask), implementation="triton"),
            (q, kv, kv),
            mask,
        )
    for X, Q, S, N, G, H in attention_shapes.PUBLISHED:
        q, kv, segments = _array((X, Q, N, H), dtype), _array((X, S, G, H), dtype), _array((X, S), jnp.int32)
        yield from _recorded(
            f"causal, {N} heads of {H}, {N // G} a group",
            lambda q, k, v, segments: attention.attention(
                q, k, v, attention.CausalMask(segments, segments), implementation="triton"
            ),
            (q, kv, kv),
            segments,
        )


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _recorded(case: str, run: Callable[..., jax.Array], arrays: tuple, *others: Any) -> list[Launch]:
    """The kernels that a forward and backward pass launches."""
    found: list[Launch] = []

    def backward(arrays: tuple, *others: Any) -> Any:
        o, vjp = jax.vjp(lambda *arrays: run(*arrays, *others), *arrays)
        return vjp(o)

    with _recording(case, found):
        jax.eval_shape(backward, arrays, *others)
    return found


@contextmanager
def _recording(case: str, found: list[Launch]) -> Iterator[None]:
    def call(
        kernel: Any,
        *inputs: jax.Array,
        outputs: Sequence[jax.ShapeDtypeStruct],
        grid: tuple[int, ...],
        num_warps: int = 4,
        num_stages: int = 1,
        **constants: Any,
    ) -> tuple[jax.Array, ...]:
        types = [POINTERS[str(x.dtype)] for x in (*inputs, *outputs)]
        signature = dict(zip(kernel.arg_names, types, strict=False))
        found.append(Launch(case, kernel, signature, constants, num_warps, num_stages))
        return tuple(jnp.zeros(x.shape, x.dtype) for x in outputs)

    modules = [import_module(f"retro_jax.kernels.{name}.triton") for name in ("attention", "chunked_cross_attention")]
    patches = [mock.patch.object(module, "call", call) for module in modules]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


class Row(NamedTuple):
    """A kernel at a shape, and what the compilers for each GPU make of it."""

    case: str
    kernel: str
    reports: dict[int, compiled.Report]


def rows(capabilities: Sequence[int] = tuple(SHARED)) -> Iterator[Row]:
    """Compile all of them, with progress."""
    found = [launches(capability) for capability in capabilities]
    for number, same in enumerate(zip(*found, strict=True)):
        print(f"\r{number + 1} of {len(found[0])} kernels", end="", file=sys.stderr, flush=True)
        reports = {capability: launch.report(capability) for capability, launch in zip(capabilities, same, strict=True)}
        yield Row(same[0].case, same[0].kernel.__name__, reports)
    print(file=sys.stderr)


def table(found: Iterator[Row]) -> list[str]:
    """Lines of a Markdown table."""
    names = " / ".join(NAMES.values())
    lines = [f"| operation | kernel | registers {names} | spilled bytes | shared KiB |", "| --- | --- | --- | --- | --- |"]
    for row in found:
        reports = row.reports.values()
        registers, spills = (" / ".join(str(getattr(r, kind)) for r in reports) for kind in ("registers", "spills"))
        shared = " / ".join(f"{r.shared / 1024:.0f}" for r in reports)
        lines.append(f"| {row.case} | {row.kernel} | {registers} | {spills} | {shared} |")
    return lines


def main() -> None:
    """Compile and print, or write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--write", type=Path, help="the file whose table is replaced")
    given = arguments.parse_args()
    lines = table(rows())
    if given.write is None:
        print("\n".join(lines))
        return
    before, _, after = given.write.read_text().split(MARK)
    given.write.write_text("\n".join([before + MARK, *lines, MARK + after]))


if __name__ == "__main__":
    main()
