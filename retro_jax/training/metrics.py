"""What a run leaves to be read: ``metrics.jsonl``, ``timings.jsonl``, TensorBoard.

``metrics.jsonl`` holds what the data and the seed decide, so that a run which was killed and continued leaves the same bytes as
one that was not. A line is an object with ``step`` and either

* ``loss`` (mean over all targets since the line before, nats), ``grad_norm`` (of this step, before clipping),
  ``learning_rate`` (of this step) and ``targets`` (all so far), or
* ``valid_loss`` and ``valid_targets``.

``timings.jsonl`` holds what the machine decides, at the steps of the former: ``seconds`` (of training alone: without compiling,
validation and saves), and since the line before ``tokens_per_second`` (row places, padding counted), ``flops_per_second`` (of
the model's matrix products, see :mod:`retro_jax.training.flops`) and ``mfu`` (their share of the device's peak; null where that
is not known).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from retro_jax.artefact import write_text
from retro_jax.training.step import StepMetrics

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

METRICS, TIMINGS, TENSORBOARD = "metrics.jsonl", "timings.jsonl", "tensorboard"


@dataclass
class Totals:
    """Sums that go on over a restart: they stand in every checkpoint."""

    targets: int = 0
    window_loss: float = 0.0
    window_targets: int = 0
    window_steps: int = 0
    seconds: float = 0.0
    window_seconds: float = 0.0

    def add(self, metrics: StepMetrics, seconds: float) -> None:
        """Count one step, given on the host, and the seconds that it took."""
        targets = int(metrics.targets)
        self.targets += targets
        self.window_loss += float(metrics.loss) * targets
        self.window_targets += targets
        self.window_steps += 1
        self.seconds += seconds
        self.window_seconds += seconds

    def clear_window(self) -> None:
        """Begin a new line."""
        self.window_loss, self.window_targets, self.window_steps, self.window_seconds = 0.0, 0, 0, 0.0

    @property
    def loss(self) -> float:
        """Mean over the targets since the last line."""
        return self.window_loss / max(1, self.window_targets)

    def plain(self) -> dict:
        """As JSON values."""
        return dataclasses.asdict(self)


class MetricLog:
    """Writes a model's lines.

    Args:
        folder: the model's folder.
        restored: the step that the run continues at; what stands behind it is dropped. 0 for a new run.
        writes: False writes nothing: another process does.
    """

    def __init__(self, folder: Path, restored: int, *, writes: bool = True) -> None:
        self._folder = folder
        self._board: SummaryWriter | None = None
        if not writes:
            return
        for name in (METRICS, TIMINGS):
            truncate(folder / name, restored)
        from tensorboardX import SummaryWriter  # it imports PyTorch where that is installed

        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=restored + 1, write_to_disk=True)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._board is not None:
            self._board.close()

    def metrics(self, step: int, **values: float) -> None:
        """One line of what the data decide."""
        self._write(METRICS, step, values)

    def timings(self, step: int, **values: float | None) -> None:
        """One line of what the machine decides."""
        self._write(TIMINGS, step, values)

    def _write(self, file: str, step: int, values: dict[str, Any]) -> None:
        if self._board is None:
            return
        with open(self._folder / file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file of :class:`MetricLog`; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def truncate(path: Path, step: int) -> None:
    """Drop the lines behind ``step``, and one that a kill has cut."""
    if not path.exists():
        return
    old = path.read_text(encoding="utf-8")
    whole = [line for line in old.splitlines(keepends=True) if line.endswith("\n")]
    kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
    if kept != old:
        write_text(path, kept)
