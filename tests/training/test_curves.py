"""One picture of all models of a workdir."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np

from retro_jax.training.curves import draw_curves, seconds_at


def write(folder: Path, losses: dict[int, float], valid: dict[int, float], seconds: dict[int, float]) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": s, "loss": v} for s, v in losses.items()] + [{"step": s, "valid_loss": v} for s, v in valid.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timings.jsonl").write_text("".join(json.dumps({"step": s, "seconds": v}) + "\n" for s, v in seconds.items()))


def coloured(image: np.ndarray, colour: tuple[float, float, float]) -> int:
    return int((np.abs(image[..., :3] - np.array(colour)).max(-1) < 0.1).sum())


def test_every_model_is_drawn(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) is None
    blue, orange = (0.12, 0.47, 0.71), (1.0, 0.5, 0.05)
    write(tmp_path / "models" / "gpt", {10: 5.0, 20: 4.0}, {20: 4.5}, {10: 1.0, 20: 3.0})
    assert draw_curves(tmp_path) == tmp_path / "curves.png"
    one = matplotlib.image.imread(tmp_path / "curves.png")
    write(tmp_path / "models" / "retro", {10: 5.0, 20: 3.0}, {}, {10: 2.0, 20: 6.0})
    draw_curves(tmp_path)
    two = matplotlib.image.imread(tmp_path / "curves.png")
    assert coloured(one, blue) > 300 and coloured(one, orange) == 0
    assert coloured(two, blue) > 300 and coloured(two, orange) > 300


def test_seconds_are_interpolated_between_lines(tmp_path: Path) -> None:
    write(tmp_path / "gpt", {}, {}, {10: 1.0, 20: 3.0})
    np.testing.assert_allclose(seconds_at(tmp_path / "gpt", [0, 5, 10, 15, 20]), [0.0, 0.5, 1.0, 2.0, 3.0])
