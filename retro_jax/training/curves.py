"""Loss curves of all models of a workdir in one picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retro_jax.artefact import write_bytes
from retro_jax.training.metrics import METRICS, TIMINGS, read_lines

FILE = "curves.png"


def draw_curves(workdir: Path) -> Path | None:
    """Write ``<workdir>/curves.png``: training loss (line) and validation loss (dots) of every model, by step and by seconds of
    training. Returns its path; None where nothing has been trained."""
    models = {path.parent.name: path.parent for path in sorted((workdir / "models").glob(f"*/{METRICS}"))}
    lines = {name: read_lines(folder / METRICS) for name, folder in models.items()}
    if not any(lines.values()):
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_seconds = figure.subplots(1, 2, sharey=True)
    for number, (name, folder) in enumerate(models.items()):
        for kind, key, style in (("training", "loss", "-"), ("validation", "valid_loss", "o--")):
            steps = [line["step"] for line in lines[name] if key in line]
            values = [line[key] for line in lines[name] if key in line]
            for axes, places in ((by_step, steps), (by_seconds, seconds_at(folder, steps))):
                if steps:
                    axes.plot(places, values, style, color=f"C{number}", linewidth=1, markersize=4, label=f"{name}, {kind}")
    by_step.set(xlabel="step", ylabel="loss (nats a token)")
    by_seconds.set(xlabel="seconds of training")
    for axes in (by_step, by_seconds):
        axes.grid(alpha=0.3)
    by_step.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_bytes(workdir / FILE, buffer.getvalue())
    return workdir / FILE


def seconds_at(folder: Path, steps: list[int]) -> np.ndarray:
    """Seconds of training at each of ``steps``: between the lines of ``timings.jsonl`` in proportion."""
    lines = read_lines(folder / TIMINGS)
    return np.interp(steps, [0, *(line["step"] for line in lines)], [0.0, *(line["seconds"] for line in lines)])
