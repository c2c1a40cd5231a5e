"""What a layer keeps and what it computes again, in five forms, for the four models of Korthikanti et al. (2022, Table 3):
counted in the traced program of the paper's own layer, beside the paper's formulas. Nothing is computed; no time is measured.

    python -m benchmarks.recomputation --compile --output benchmarks/results/recomputation.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.paper_layer import FORMS, compiled_bytes, program_bytes, program_flops
from retro_jax.config import MeshConfig
from retro_jax.planning.compiled import described_mesh
from retro_jax.planning.paper import MODELS, PaperModel, full_flops, layer_bytes, model_flops, selective_flops
from retro_jax.planning.target import TARGETS

RESULTS = Path(__file__).parent / "results" / "recomputation.json"


def main() -> None:
    """Count, check, write and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, default=RESULTS)
    arguments.add_argument("--compile", action="store_true", help="let XLA compile the 22B layer for 8 H100s too (extra cuda)")
    given = arguments.parse_args()
    models = {name: counted(model) for name, model in MODELS.items()}
    for name, forms in models.items():
        for form, figures in forms.items():
            if figures["program_bytes"] != figures["formula_bytes"]:
                sys.exit(
                    f"{name}, {form}: {figures['program_bytes']} bytes in the program, {figures['formula_bytes']} by the formula"
                )
    result = {
        "command": "python -m benchmarks.recomputation" + (" --compile" if given.compile else ""),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "settings": {"tensor": 8, "dtype": "bfloat16", "seq_len": 2048, "vocab": 51200},
        "models": models,
    }
    if given.compile:
        result["compiled"] = compiled("22B", models["22B"])
    given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(models, Console())
    for name, figures in result.get("compiled", {}).get("forms", {}).items():
        size, of_program = figures["bytes"] / 2**20, figures["of_program"]
        print(f"22B compiled for 8 H100s, {name}: {size:,.2f} MiB a layer, {of_program:.3f} of the program's")


def compiled(name: str, forms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What XLA for H100s holds of a layer in each form, beside the program's bytes."""
    mesh = described_mesh(MeshConfig(tensor=8), TARGETS["h100"])
    found: dict[str, Any] = {"model": name, "target": TARGETS["h100"].name, "forms": {}}
    for form in FORMS:
        size = compiled_bytes(MODELS[name], FORMS[form], mesh)
        found["forms"][form] = {"bytes": size, "of_program": round(size / forms[form]["program_bytes"], 4)}
    base = found["forms"]["tensor"]["bytes"]
    for figures in found["forms"].values():
        figures["percent_of_tensor_alone"] = round(100 * figures["bytes"] / base, 1)
    return found


def counted(model: PaperModel) -> dict[str, dict[str, Any]]:
    """Each form's bytes of a layer on one device, in the program and by the formula; its share of what tensor parallelism alone
    keeps; and operations of a step with all layers and the output layer, of the program and of the paper's equations 7 to 9."""
    own, base = model_flops(model), layer_bytes(model, sequence=False, policy="none")
    equations = {"none": own, "selective": selective_flops(model), "full": full_flops(model)}
    figures = {}
    for name, form in FORMS.items():
        kept, flops = program_bytes(model, form), step_flops(model, program_flops(model, form))
        figures[name] = {
            "program_bytes": kept,
            "formula_bytes": layer_bytes(model, sequence=form.sequence, policy=form.policy),
            "percent_of_tensor_alone": round(100 * kept / base, 1),
            "program_flops": flops,
            "computed_again_percent": round(100 * (flops / own - 1), 2),
            "paper_flops": equations[form.policy],
            "paper_again_percent": round(100 * (equations[form.policy] / own - 1), 2),
        }
    return figures


def step_flops(model: PaperModel, layer: int) -> int:
    """Operations of a step: a layer's of a microbatch, for all layers and microbatches, and the output layer's."""
    microbatches = model.batch // model.microbatch
    return microbatches * model.layers * layer + 6 * model.batch * model.seq_len * model.width * model.vocab


def print_table(models: dict[str, dict[str, dict[str, Any]]], console: Console) -> None:
    """A row for each model and form."""
    table = Table(
        "model", "form", "MiB in the program", "by the formula", "% of tensor", "computed again %", "paper's equation %"
    )
    for model, forms in models.items():
        for name, figures in forms.items():
            kept, formula = (f"{figures[kind] / 2**20:,.2f}" for kind in ("program_bytes", "formula_bytes"))
            again, equation = (f"{figures[kind]:.2f}" for kind in ("computed_again_percent", "paper_again_percent"))
            table.add_row(model, name, kept, formula, f"{figures['percent_of_tensor_alone']:.1f}", again, equation)
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
