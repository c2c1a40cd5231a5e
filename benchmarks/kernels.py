"""The kernels: are they right, how fast are they beside the limits of the device, and beside what else there is?

With --gpu, on a machine with an H100 or H200, in bfloat16: chunked cross-attention, the encoder's and the decoder's attention,
and the linear layer with cross-entropy, by every implementation of ours and every rival that is installed
(jax.nn.dot_product_attention, tokamax, PyTorch, plain einsum). Without, on the CPU: a small set in float32. A case that fails is
recorded with its reason.

First the ceilings are measured, a matrix product and a copy of random numbers. Then every side is checked on small shapes: the
error of ours is at most 2 times (gradients: 3 times) that of a plain computation in the same dtype, and a rival computes the same
function. A side that is wrong is not timed, and if it is ours the exit code is 1. Then come the cases: rounds of all sides and of
the ceilings alternate in one process. A side's share of the floor, in brackets, is max(operations / the product's rate, bytes /
the copy's rate) / its median time, with operations and bytes of benchmarks/kernel_costs.py. How short kernels are timed:
benchmarks/kernel_programs.py. The file is written after every case.

    python -m benchmarks.kernels                                        # CPU, under 3 minutes
    python -m benchmarks.kernels --gpu --output kernels_h100.json       # 8 minutes
    python -m benchmarks.kernels --gpu --only "CCA 256" decoder         # cases whose name or operation holds one of these
    python -m benchmarks.kernels --gpu --tune --only chunked            # the tiles of the Triton kernels
    python -m benchmarks.kernels --table FILE                           # the tables of a result, in Markdown
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.ceilings import CPU, GPU, Ceilings, data_sheet, short_name
from benchmarks.kernel_cases import CHECK_CASES, CPU_CASES, GPU_CASES, PASSES, Case
from benchmarks.kernel_checks import check
from benchmarks.kernel_report import Report, lines, run_cases, table
from benchmarks.kernel_rounds import measure
from benchmarks.kernel_sides import implementations, our_sides, rival_sides
from benchmarks.kernel_tuning import tune
from benchmarks.reasons import reason_of
from benchmarks.timing import cpu_name
from retro_jax.host_memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
SECONDS = {"gpu": 420.0, "cpu": 100.0}
STARTED = time.monotonic()
PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
    "jax-triton", "triton", "tokamax", "torch", "numpy",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, write and print."""
    given = parser().parse_args(arguments)
    if given.table:
        result = json.loads(given.table.read_text())
        print("\n\n".join(table(result, which) for which in PASSES))
        return 0
    kept = prepare(given.gpu)
    if given.gpu and (backend := backend_or_reason()) != "gpu":
        print(f"--gpu: JAX finds no GPU here ({backend}); run without --gpu, or where there is one with retro-jax[gpu] installed")
        return 2
    cases = chosen(GPU_CASES if given.gpu else CPU_CASES, given.only)
    if not cases:
        print(f"--only {' '.join(given.only)}: no case has that in its name; see --help")
        return 2
    dtype = "bfloat16" if given.gpu else "float32"
    told = facts(given, kept, dtype)
    report = Report(given.output or RESULTS / f"kernels_{short_name(told['device']['kind'])}.json", told)
    for key in ("device", "versions"):
        print(f"{key}: " + ", ".join(f"{name} {value}" for name, value in report.result[key].items()), flush=True)
    ceilings = Ceilings(GPU if given.gpu else CPU)
    measure_ceilings(ceilings, report)
    for operation in dict.fromkeys(case.operation for case in cases):
        check_operation(operation, report, dtype, given.gpu)

    def one(case: Case, seconds: float) -> dict[str, Any]:
        if given.tune:
            return tune(case, dtype=dtype, on_gpu=given.gpu)
        wrong = report.wrong(case.operation)
        sides = [side for side in (*our_sides(case), *rival_sides(case, given.gpu)) if side.name not in wrong]
        try:
            return measure(case, sides, ceilings, dtype=dtype, on_gpu=given.gpu, seconds=seconds)
        finally:
            free()

    def tell(row: dict[str, Any]) -> None:
        print("\n".join(f"[{len(report.result['cases'])}/{len(cases)}] {line}" for line in lines(row)), flush=True)

    run_cases(cases, one, report, given.seconds or SECONDS["gpu" if given.gpu else "cpu"], time.monotonic, tell)
    report.result["load_average_at_the_end"] = round(os.getloadavg()[0], 2)
    report.write()
    print(f"written to {report.path}; {time.monotonic() - STARTED:.0f} s")
    return report.exit_code()


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--gpu", action="store_true", help="the GPU's cases, in bfloat16; without it the CPU's, in float32")
    options.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="cases that have one of these in name or operation"
    )
    options.add_argument(
        "--seconds", type=float, help="for all cases together (420, on a CPU 100); what they leave over is not run"
    )
    options.add_argument("--output", type=Path, help="default: benchmarks/results/kernels_cpu.json, or kernels_h100.json")
    options.add_argument("--tune", action="store_true", help="time the tiles that the Triton kernels could take")
    options.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a result and do nothing else")
    return options


def prepare(gpu: bool) -> bool:
    """Before JAX starts: the CPU keeps freed memory; on the GPU JAX leaves room for PyTorch. Returns whether memory is kept."""
    if gpu:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    return keep_freed_memory()


def backend_or_reason() -> str:
    """Where JAX computes, or why it cannot."""
    try:
        return jax.default_backend()
    except RuntimeError as error:
        return str(error).splitlines()[0]


def chosen(cases: tuple[Case, ...], only: list[str]) -> list[Case]:
    """Those whose name or operation holds one of the given texts."""
    return [case for case in cases if not only or any(text in case.name or text in case.operation for text in only)]


def facts(given: argparse.Namespace, kept: bool, dtype: str) -> dict[str, Any]:
    """What was run, where and with what."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    options = [name for name in ("gpu", "tune") if getattr(given, name)]
    command = " ".join(["python -m benchmarks.kernels", *(f"--{name}" for name in options)])
    command += f" --only {' '.join(map(repr, given.only))}" if given.only else ""
    command += f" --seconds {given.seconds:g}" if given.seconds else ""
    return {
        "command": command,
        "device": {"kind": jax.devices()[0].device_kind, "processor": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version()} | {name: installed[name] for name in PACKAGES if name in installed},
        "dtype": dtype,
        "keeps_freed_memory": kept,
        "load_average": round(os.getloadavg()[0], 2),
    }


def measure_ceilings(ceilings: Ceilings, report: Report) -> None:
    """The device's rates before the first case, printed and recorded."""
    found = ceilings.measure()
    sheet = data_sheet(report.result["device"]["kind"])
    report.result["ceilings"] = found | ({"data_sheet": sheet} if sheet else {})
    report.write()
    medians = {name: found[name]["median"] for name in ("flops_a_second", "bytes_a_second")}
    shares = {name: f" ({rate / sheet[name]:.2f} of the data sheet's)" if sheet else "" for name, rate in medians.items()}
    print(
        f"ceilings: product {medians['flops_a_second'] / 1e12:.4g} TFLOP/s{shares['flops_a_second']}, "
        f"copy {medians['bytes_a_second'] / 1e9:.4g} GB/s{shares['bytes_a_second']}",
        flush=True,
    )


def check_operation(operation: str, report: Report, dtype: str, gpu: bool) -> None:
    """Check every side of an operation on small shapes; say what is wrong and what is not there."""
    there = implementations(operation)
    if not there:
        print(f"{operation}: ours is not there")
    for case in CHECK_CASES:
        if case.operation == operation:
            try:
                rows = check(case, dtype=dtype, on_gpu=gpu)
            except Exception as error:  # the reference itself: then nothing of ours is known to be right
                told = {"side": "reference", "ours": True, "right": False, "failed": reason_of(error)}
                rows = [{"operation": operation, "case": case.name, **told}]
            report.add_checks(rows)
            for row in rows:
                times = {name: error["times_plain"] for name, error in row.get("errors", {}).items()}
                worst = f"errors at most {max(times.values()):.2f} of the plain computation's" if times else ""
                state = row.get("refused") or row.get("failed") or ("right" if row["right"] else f"WRONG {times}")
                print(f"check {case.name}, {'*' if row['ours'] else ''}{row['side']}: {state}; {worst}".rstrip("; "), flush=True)


def free() -> None:
    """What the last case left on the device."""
    jax.clear_caches()
    if "torch" in sys.modules:
        from benchmarks import torch_rivals

        torch_rivals.forget()


if __name__ == "__main__":
    sys.exit(main())
