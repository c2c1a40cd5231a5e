"""Kernels as they are compiled for A100 and H100, without one: nothing is spilled, and shared memory is enough."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
from benchmarks.kernel_resources import MARK, SHARED, Launch, launches, rows, table
from retro_jax.kernels import compiled

ROOT = Path(__file__).parents[2]


def hold(launch: str, capability: int, report: compiled.Report) -> None:
    assert report.spills == 0, (launch, capability, report)
    assert report.shared <= SHARED[capability], (launch, capability, report)


@pytest.mark.parametrize("capability", SHARED)
def test_each_kernel(capability: int) -> None:
    """At the last published shape that launches it, the widest."""
    last: dict[str, Launch] = {launch.kernel.__name__: launch for launch in launches(capability)}
    assert last.keys() == {
        "cca_forward", "cca_backward", "cca_query_gradient", "causal_forward", "causal_query_gradient", "causal_key_gradient",
    }  # fmt: skip
    for name, launch in last.items():
        hold(name, capability, launch.report(capability))


@pytest.mark.slow
def test_every_shape_and_the_table_in_the_docs() -> None:
    found = list(rows())
    for row in found:
        for capability, report in row.reports.items():
            hold(f"{row.case}, {row.kernel}", capability, report)
    assert (ROOT / "docs" / "kernels.md").read_text().split(MARK)[1].strip().splitlines() == table(iter(found))
