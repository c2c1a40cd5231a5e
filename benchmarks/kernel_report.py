"""What a run of the kernels' benchmark has found so far: on disk after every step, as lines of progress, and as a table."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.reasons import reason_of


class Named(Protocol):
    """What a case must tell of itself."""

    @property
    def name(self) -> str:
        """For the table."""

    @property
    def operation(self) -> str:
        """The folder under ``kernels``."""


class Report:
    """A result that is written whenever it grows; a reader sees the old file or the new one, never a part."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.result = path, facts | {"checks": [], "cases": []}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """By renaming a finished file."""
        text = json.dumps(self.result, indent=2)
        text = re.sub(
            r"[\[{]\s[^\[\]{}]*[\]}]", _short_lines, text
        )  # lists, then objects that hold nothing but numbers and names
        text = re.sub(r"\{\s[^{}]*\}", _short_lines, text)
        unfinished = self.path.with_name(self.path.name + ".part")
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)

    def add_checks(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of :func:`benchmarks.kernel_checks.check`."""
        self.result["checks"] += rows
        self.write()

    def add_case(self, row: dict[str, Any]) -> None:
        """A row of :func:`benchmarks.kernel_rounds.measure`, or one that says why there is none."""
        self.result["cases"].append(row)
        self.write()

    def wrong(self, operation: str) -> set[str]:
        """Sides whose results for an operation are wrong: they are not timed. One that did not run may run at another shape."""
        checks = [row for row in self.result["checks"] if row["operation"] == operation]
        return {row["side"] for row in checks if "errors" in row and not row["right"]}

    def exit_code(self) -> int:
        """1 where one of ours is wrong."""
        return int(any(row["ours"] and not row.get("right", True) for row in self.result["checks"]))


def _short_lines(found: re.Match[str]) -> str:
    """On one line, where it fits."""
    line = re.sub(r"\n\s*", " ", found[0])
    line = re.sub(r"(?<=[\[{]) | (?=[\]}])", "", line)
    return line if len(line) <= 120 else found[0]


def run_cases(
    cases: Sequence[Named],
    measure: Callable[[Any, float], dict[str, Any]],
    report: Report,
    seconds: float,
    clock: Callable[[], float],
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Measure the cases in their order, each with its part of the seconds that are left; a case that fails, and one for which no
    time is left, is recorded with its reason, and the next is taken."""
    end = clock() + seconds
    for number, case in enumerate(cases):
        named = {"case": case.name, "operation": case.operation}
        left = end - clock()
        if left <= 0:
            row = named | {"failed": f"not run: the {seconds:g} seconds were over"}
        else:
            try:
                row = measure(case, left / (len(cases) - number))
            except Exception as error:  # whatever a compiler or a device may raise
                row = named | {"failed": reason_of(error)}
        report.add_case(row)
        tell(row)


def lines(row: dict[str, Any]) -> list[str]:
    """A case for a terminal: a line a pass."""
    if "failed" in row:
        return [f"{row['case']}: {row['failed']}"]
    told = []
    for which, found in row.get("passes", {}).items():
        sides = [
            f"{'*' if side['ours'] else ''}{name} {time_of(side['seconds']['median'])} ({side['of_floor']:.2f})"
            for name, side in found["sides"].items()
        ]
        sides += [f"{name}: {reason[:60]}" for name, reason in found["did_not_run"].items()]
        floor = f"floor {time_of(found['floor_seconds'])} ({found['limit']}), {found['rounds']} rounds"
        told.append(f"{row['case']}, {which}: {floor}; " + "; ".join(sides))
    for direction, found in row.get("tuned", {}).items():
        medians = {name: spread["median"] for name, spread in found["program_seconds"].items()}
        told.append(f"{row['case']}, {direction}: best {found['best']} of {medians}")
    return told


def table(result: dict[str, Any], which: str) -> str:
    """Of one pass, in Markdown: the floor and each side's median time, its share of the floor in brackets; ours come first."""
    rows = [row for row in result["cases"] if "passes" in row]
    names: dict[str, bool] = {}
    for row in rows:
        names |= {name: side["ours"] for name, side in row["passes"][which]["sides"].items()}
    columns = sorted(names, key=lambda name: not names[name])
    heads = [f"**{name}**" if names[name] else name for name in columns]
    text = [f"| {which} | floor | " + " | ".join(heads) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        found = row["passes"][which]
        cells = [_cell(found["sides"].get(name)) for name in columns]
        text.append(f"| {row['case']} | {time_of(found['floor_seconds'])} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def _cell(side: dict[str, Any] | None) -> str:
    return "" if side is None else f"{time_of(side['seconds']['median'])} ({side['of_floor']:.2f})"


def time_of(seconds: float) -> str:
    """Three digits, in a unit that fits."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} µs"
