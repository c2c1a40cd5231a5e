"""The kernels' benchmark: partial output, order, budget, exit codes, and what the checks find."""

from __future__ import annotations

import json
import sys
import types
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

from benchmarks import kernel_checks, kernel_tuning, kernels
from benchmarks.ceilings import Ceilings, Sizes, data_sheet, short_name
from benchmarks.kernel_cases import BOTH, FORWARD, CcaCase, LossCase, cca
from benchmarks.kernel_checks import check
from benchmarks.kernel_programs import build, draw
from benchmarks.kernel_report import Report, lines, run_cases, table, time_of
from benchmarks.kernel_rounds import measure
from benchmarks.kernel_sides import Side, implementations, our_sides, ours, plain

SMALL = CcaCase(rows=1, chunks=2, heads=2, groups=1, width=8, neighbours=1, absent=True)
TINY = Sizes(matrix=64, copied=2**16, dtype="float32", calls=1)


class Fake(NamedTuple):
    name: str
    operation: str = "fake"


class Clock:
    """Seconds that pass when a case is measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_failing_case_is_recorded_on_disk_and_the_run_goes_on_in_order(tmp_path):
    path, seen = tmp_path / "result.json", []

    def one(case: Fake, seconds: float) -> dict[str, Any]:
        seen.append([row["case"] for row in json.loads(path.read_text())["cases"]])
        if case.name == "b":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.\nmore")
        return {"case": case.name, "operation": case.operation, "passes": {}}

    report = Report(path, {"command": "x"})
    told: list[str] = []
    run_cases([Fake("a"), Fake("b"), Fake("c")], one, report, 60.0, Clock(), lambda row: told.append(row["case"]))
    assert seen == [[], ["a"], ["a", "b"]]
    rows = json.loads(path.read_text())["cases"]
    assert [row["case"] for row in rows] == told == ["a", "b", "c"]
    assert rows[1]["failed"] == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes."
    assert lines(rows[1]) == [f"b: {rows[1]['failed']}"]
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert report.exit_code() == 0


def test_the_seconds_are_spread_over_what_is_left_and_a_cut_run_says_so(tmp_path):
    clock, given = Clock(), []

    def one(case: Fake, seconds: float) -> dict[str, Any]:
        given.append(seconds)
        clock.now += {"a": 4.0, "b": 7.0}[case.name]
        return {"case": case.name}

    report = Report(tmp_path / "result.json", {})
    run_cases([Fake(name) for name in "abcd"], one, report, 10.0, clock, lambda row: None)
    assert given == [2.5, 2.0]
    assert [row.get("failed") for row in report.result["cases"]] == [None, None, *["not run: the 10 seconds were over"] * 2]


@pytest.mark.parametrize(
    ("row", "code", "untimed"),
    [
        ({"ours": True, "right": False, "errors": {}}, 1, {"s"}),
        ({"ours": True, "right": False, "failed": "RuntimeError: ptxas died"}, 1, set()),
        ({"ours": False, "right": False, "errors": {}}, 0, {"s"}),
        ({"ours": True, "refused": "it needs a GPU"}, 0, set()),
        ({"ours": True, "right": True}, 0, set()),
    ],
)
def test_the_exit_code_tells_whether_ours_is_wrong(tmp_path, row, code, untimed):
    report = Report(tmp_path / "result.json", {})
    report.add_checks([{"operation": "x", "side": "s"} | row])
    assert (report.exit_code(), report.wrong("x"), report.wrong("y")) == (code, untimed, set())


def test_a_case_is_timed_beside_its_floor():
    double = Side("double", lambda arrays, given: 2 * ours(SMALL, "xla")(arrays, given))

    def refuse(arrays, given):
        raise ValueError("it needs a GPU")

    sides = [Side("xla", ours(SMALL, "xla"), ours=True), Side("gpu only", refuse, ours=True), double]
    row = measure(SMALL, sides, Ceilings(TINY), dtype="float32", on_gpu=False, seconds=0.5)
    assert (row["case"], row["settings"]["absent"]) == (SMALL.name, True)
    for which, cost in SMALL.costs(4).items():
        found = row["passes"][which]
        assert (found["flops"], found["bytes"]) == (cost.flops, cost.bytes)
        assert found["floor_seconds"] == pytest.approx(cost.floor(*found["ceilings"].values()), rel=2e-3)
        assert found["did_not_run"] == {"gpu only": "it needs a GPU"}
        assert 5 <= found["rounds"] <= 20
        assert list(found["sides"]) == ["xla", "double"]
        side = found["sides"]["xla"]
        assert side["of_floor"] == pytest.approx(found["floor_seconds"] / side["seconds"]["median"], rel=0.01)
        assert side["tflops"] == pytest.approx(cost.flops / side["seconds"]["median"] / 1e12, rel=0.01)
        assert set(found["ours_is_faster"]) == {"xla"} and set(found["ours_is_faster"]["xla"]) == {"double"}
    assert table({"cases": [row]}, FORWARD).splitlines()[0] == f"| {FORWARD} | floor | **xla** | double |"


def test_several_sets_of_inputs_are_computed_one_after_the_other_and_not_as_one(monkeypatch):
    monkeypatch.setattr("benchmarks.kernel_programs.sets_of", lambda moved: 3)
    side = Side("xla", ours(SMALL, "xla"), ours=True)
    problems = draw(SMALL, BOTH, dtype="float32", on_gpu=True)
    program = build(SMALL, [side], problems, BOTH, dtype="float32", on_gpu=True)["xla"]
    assert program.sets == 3
    results = program.call()
    assert len(results) == 3
    o = [result[0] for result in results]
    assert not jnp.allclose(o[0], o[1]) and not jnp.allclose(o[1], o[2])


def test_every_side_here_is_right_and_a_wrong_one_is_found(monkeypatch):
    rows = {row["side"]: row for row in check(SMALL, dtype="float32", on_gpu=False)}
    assert rows["xla"]["right"] and rows["einsum"]["right"] and rows["jax.nn xla"]["right"]

    def off_by_one(arrays, given):
        return ours(SMALL, "xla")(arrays, given | {"valid": jnp.roll(given["valid"], 1, -1)})

    def broken(arrays, given):
        raise RuntimeError("ptxas died")

    sides = [Side("off", off_by_one, ours=True), Side("broken", broken, ours=True)]
    monkeypatch.setattr(kernel_checks, "our_sides", lambda case: sides)
    monkeypatch.setattr(kernel_checks, "rival_sides", lambda case, on_gpu: [Side("off too", off_by_one)])
    off, failed, rival = check(SMALL, dtype="float32", on_gpu=False)
    assert not off["right"] and off["errors"]["result"]["times_plain"] > 100
    assert (failed["right"], failed["failed"]) == (False, "RuntimeError: ptxas died")
    assert not rival["right"]


def test_implementations_are_those_of_the_operation():
    assert implementations("chunked_cross_attention")[0] == "xla"
    assert implementations("no_such_operation") == ()
    assert [side.name for side in our_sides(SMALL)] == list(implementations("chunked_cross_attention"))


def test_torch_computes_the_same_loss():
    pytest.importorskip("torch")
    rows = {row["side"]: row for row in check(LossCase(tokens=64, width=16, vocab=100), dtype="bfloat16", on_gpu=False)}
    assert rows["torch cross_entropy"]["right"] and rows["materialised logits"]["right"]


def test_tuning_tells_what_cannot_be_tuned(monkeypatch):
    monkeypatch.setattr(kernel_tuning, "candidates", lambda operation: {})
    row = kernel_tuning.tune(SMALL, dtype="float32", on_gpu=False)
    assert row["failed"] == "chunked_cross_attention names no candidates (shapes.CANDIDATES is not there)"


def test_tuning_traces_with_each_candidate_and_goes_on_where_one_does_not_compile(monkeypatch):
    class Tiles(NamedTuple):
        queries: int

    module, traced = types.ModuleType("triton"), []
    module.forward_blocks, module.backward_blocks = (lambda *_: Tiles(64)), (lambda *_: Tiles(32))

    def call(arrays, given):
        traced.append((module.forward_blocks(1).queries, module.backward_blocks(1).queries))
        if traced[-1][0] == 256:
            raise RuntimeError("out of shared memory")
        return arrays[0]

    monkeypatch.setitem(sys.modules, "retro_jax.kernels.chunked_cross_attention.triton", module)
    tiles = {"forward": (Tiles(128), Tiles(256)), "backward": (Tiles(16),)}
    monkeypatch.setattr(kernel_tuning, "candidates", lambda operation: tiles)
    monkeypatch.setattr(kernel_tuning, "ours", lambda case, name: call)
    tuned = kernel_tuning.tune(SMALL, dtype="float32", on_gpu=False)["tuned"]
    assert traced == [(64, 32), (128, 32), (256, 32), (64, 32), (64, 16)]
    assert list(tuned["forward"]["program_seconds"]) == ["chosen", "queries=128"]
    assert tuned["forward"]["did_not_run"] == {"queries=256": "RuntimeError: out of shared memory"}
    assert tuned["backward"]["best"] in ("chosen", "queries=16")


def test_the_tables_in_the_docs_are_those_of_the_result():
    result = json.loads((kernels.RESULTS / "kernels_cpu.json").read_text())
    text = (kernels.RESULTS.parent.parent / "docs" / "kernels.md").read_text()
    for which in (FORWARD, BOTH):
        assert table(result, which) in text


def test_without_a_gpu_it_says_so(capsys):
    assert kernels.main(["--gpu"]) == 2
    told = capsys.readouterr().out
    assert told == "--gpu: JAX finds no GPU here (cpu); run without --gpu, or where there is one with retro-jax[gpu] installed\n"


def test_a_name_that_no_case_has(capsys):
    assert kernels.main(["--only", "convolution"]) == 2
    assert capsys.readouterr().out == "--only convolution: no case has that in its name; see --help\n"


def test_a_run_from_end_to_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "CPU_CASES", (SMALL, cca(32, 1, 1, 8)))
    monkeypatch.setattr(kernels, "CHECK_CASES", (SMALL,))
    monkeypatch.setattr(kernels, "CPU", TINY)
    monkeypatch.setattr(kernels, "keep_freed_memory", lambda: False)
    for module in (kernels, kernel_checks):
        monkeypatch.setattr(module, "rival_sides", lambda case, on_gpu: [Side("einsum", plain(case))])
    path = tmp_path / "out" / "kernels.json"
    assert kernels.main(["--only", "absent", "--seconds", "1", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [row["case"] for row in result["cases"]] == [SMALL.name]
    assert result["ceilings"]["flops_a_second"]["median"] > 0 and "load_average" in result
    assert {row["side"] for row in result["checks"]} == {*implementations(SMALL.operation), "einsum"}
    assert "[1/1] CCA 2 chunks" in capsys.readouterr().out
    assert kernels.main(["--table", str(path)]) == 0
    assert capsys.readouterr().out.count(SMALL.name) == 2


def test_times_are_told_in_units_that_fit():
    assert [time_of(seconds) for seconds in (1.234, 0.01234, 24.5e-6)] == ["1.23 s", "12.3 ms", "24.5 µs"]


def test_ceilings_are_operations_and_bytes_by_time():
    ceilings = Ceilings(TINY)
    timed = ceilings.timed()
    timed["matmul"].wall, timed["copy"].wall = [1.0, 2.0], [0.5, 1.0]
    rates = ceilings.rates(timed)
    assert rates["flops_a_second"].tolist() == [2 * 64**3, 64**3]
    assert rates["bytes_a_second"].tolist() == [4 * 2**16, 2 * 2**16]
    assert (short_name("NVIDIA H100 80GB HBM3"), short_name("cpu")) == ("h100", "cpu")
    assert (data_sheet("NVIDIA H200")["bytes_a_second"], data_sheet("cpu")) == (4.8e12, {})
