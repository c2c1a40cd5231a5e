"""What lm_eval found of several models, as one record and one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

# Standard errors to either side of a 95% interval.
WIDE = 1.96


def figures(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict]:
    """By task: ``documents``, and by metric ``higher_is_better`` and the ``models`` with value, stderr, low and high (None where
    lm_eval has no standard error). A metric after a filter is named "metric (filter)".

    Args:
        found: what ``lm_eval.evaluator.evaluate`` returned, by model.
    """
    tasks: dict[str, dict] = {}
    for row, results in found.items():
        for task, values in results["results"].items():
            counts = results["n-samples"].get(task, {})
            here = tasks.setdefault(task, {"documents": counts.get("effective"), "metrics": {}})
            for key, value in values.items():
                metric, comma, filtered = key.partition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                higher = results["higher_is_better"].get(task, {}).get(metric)
                entry = here["metrics"].setdefault(name, {"higher_is_better": higher, "models": {}})
                entry["models"][row] = _figure(value, values.get(f"{metric}_stderr,{filtered}"))
    return tasks


def print_harness(result: Mapping[str, Any], console: Console) -> None:
    """A row a task and metric, a column a model and mode."""
    table = Table(
        title="lm-evaluation-harness",
        caption="95% intervals from lm_eval's standard errors; ↑: more is better, ↓: less",
    )
    table.add_column("task")
    table.add_column("documents", justify="right")
    table.add_column("metric")
    rows = list(result["models"])
    for row in rows:
        table.add_column(row, justify="right")
    for task, facts in result["tasks"].items():
        for number, (metric, entry) in enumerate(facts["metrics"].items()):
            first = (task, f"{facts['documents']:,}" if facts["documents"] else "") if number == 0 else ("", "")
            arrow = {True: " ↑", False: " ↓"}.get(entry["higher_is_better"], "")
            table.add_row(*first, metric + arrow, *(_cell(entry["models"].get(row)) for row in rows))
    console.print(table)


def _figure(value: Any, stderr: Any) -> dict[str, float | None]:
    known = isinstance(stderr, (int, float))
    low, high = (float(value) - WIDE * stderr, float(value) + WIDE * stderr) if known else (None, None)
    return {"value": float(value), "stderr": float(stderr) if known else None, "low": low, "high": high}


def _cell(figure: Mapping[str, float | None] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    value = f"{figure['value']:.4g}"
    return value if figure["low"] is None else f"{value}\n{figure['low']:.4g} to {figure['high']:.4g}"
