"""Is a plan right? The memory of a step as it is planned against what XLA makes of it for H100s, compiled without any; and how
long the compiler takes for 12 and for 48 layers. Needs the extra ``cuda``, no GPU. A case takes minutes; none is done twice.

    python -m benchmarks.compiled_memory --output benchmarks/results/compiled_memory.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console
from rich.table import Table

from retro_jax.gin_config import load_config
from retro_jax.planning.command import mesh_of, model_of
from retro_jax.planning.compiled import compile_step
from retro_jax.planning.plan import make_plan
from retro_jax.planning.report import in_bytes, received_by
from retro_jax.planning.search import on_mesh
from retro_jax.planning.target import TARGETS

RESULTS = Path(__file__).parent / "results" / "compiled_memory.json"
VOCAB = "ModelConfig.vocab_size=256000"


def batch(rows: int, parts: int) -> tuple[str, str]:
    """Rows of a step, and the parts that they are accumulated in."""
    return f"DataConfig.batch_size={rows}", f"TrainConfig.accumulate={parts}"


# Config, mesh and settings, by name.
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "GPT 823M, rows divided": ("gpt_823m", "data=8", (VOCAB, "ModelConfig.recompute=selective", *batch(16, 1))),
    "GPT 823M, parameters divided": ("gpt_823m", "fsdp=8", (VOCAB, "ModelConfig.recompute=none", *batch(16, 2))),
    "Retro 410M, rows divided": (
        "retro_410m", "data=8", ("ModelConfig.vocab_size=50304", "ModelConfig.recompute=none", *batch(32, 1)),
    ),
    "InstructRetro 2.5B, parameters and layers divided": (
        "instructretro_2500m", "fsdp=2,tensor=4", (VOCAB, "ModelConfig.recompute=selective", *batch(8, 2)),
    ),
    "InstructRetro 2.5B, three axes": (
        "instructretro_2500m", "data=2,sequence=2,tensor=2", (VOCAB, "ModelConfig.recompute=full", *batch(4, 1)),
    ),
    "InstructRetro 9.5B, layers divided": (
        "instructretro_9500m", "tensor=8", (VOCAB, "ModelConfig.recompute=selective", *batch(1, 1)),
    ),
    "InstructRetro 9.5B, parameters divided": (
        "instructretro_9500m", "fsdp=8", (VOCAB, "ModelConfig.recompute=full", *batch(16, 2)),
    ),
    "GPT 22B": ("gpt_22b", "fsdp=2,tensor=8", (VOCAB, "ModelConfig.recompute=selective", *batch(4, 2))),
    "InstructRetro 48B on 16": ("instructretro_48b_h100x16", "", (VOCAB,)),
    "InstructRetro 48B on 256": ("instructretro_48b_h100x256", "", (VOCAB,)),
    "GPT of 12 layers": ("gpt_823m", "tensor=8", (VOCAB, "ModelConfig.num_layers=12", *batch(1, 1))),
    "GPT of 48 layers": ("gpt_823m", "tensor=8", (VOCAB, "ModelConfig.num_layers=48", *batch(1, 1))),
    "Retro of 12 layers": ("instructretro_878m", "tensor=8", (VOCAB, "ModelConfig.num_layers=12", *batch(1, 1))),
    "Retro of 48 layers": ("instructretro_878m", "tensor=8", (VOCAB, "ModelConfig.num_layers=48", *batch(1, 1))),
}  # fmt: skip


def main() -> None:
    """Plan and compile every case that has no result yet; print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    console = Console()
    result = json.loads(given.output.read_text()) if given.output.exists() else {"cases": {}}
    result |= {
        "command": "python -m benchmarks.compiled_memory",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin")},
        "target": TARGETS["h100"].name,
    }
    for name, (config, mesh, settings) in CASES.items():
        if name in result["cases"]:
            continue
        with console.status(f"{name} ({config} {mesh})"):
            result["cases"][name] = measured(config, mesh, settings)
        given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result["cases"], console)


def measured(name: str, mesh: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """One case: memory and exchanges, planned and compiled."""
    config = load_config([name], settings)
    if mesh:
        config = on_mesh(config, mesh_of(mesh, config.mesh))
    plan = make_plan(config, model_of(config))
    compiled = compile_step(config, plan.model, TARGETS["h100"])
    planned, real = (
        {f"{operation} over {' '.join(axes)}": size for (operation, axes), (_, size) in received_by(exchanges).items()}
        for exchanges in (plan.exchanges, compiled.exchanges)
    )
    temporary = sum(size for kind, size in plan.memory.items() if kind not in ("parameters", "optimizer", "batch", "packing"))
    return {
        "config": name,
        "mesh": mesh,
        "settings": settings,
        "planned": plan.total_memory,
        "compiled": compiled.total_memory,
        "error_percent": round(100 * (plan.total_memory / compiled.total_memory - 1), 1),
        "packing": round(compiled.temporary / temporary - 1, 3),
        "memory": plan.memory,
        "received": {kind: [size, real.get(kind, 0)] for kind, size in planned.items()}
        | {kind: [0, size] for kind, size in real.items() if kind not in planned},
        "compile_seconds": round(compiled.seconds, 1),
    }


def print_table(cases: dict[str, dict[str, Any]], console: Console) -> None:
    """A line a case."""
    table = Table("case", "planned", "compiled", "error", "compiled in")
    for name, case in cases.items():
        table.add_row(
            name,
            in_bytes(case["planned"]),
            in_bytes(case["compiled"]),
            f"{case['error_percent']:+.1f}%",
            f"{case['compile_seconds']:.0f} s",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
