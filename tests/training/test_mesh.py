"""Runs on meshes, by one process and by several: the losses of one device, also after a change of mesh or a death."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from retro_jax.config import MeshConfig
from retro_jax.errors import UserError
from retro_jax.parallel.processes import HEARTBEAT_SECONDS
from retro_jax.training.checkpoint import load_model
from retro_jax.training.metrics import METRICS, read_lines
from tests.training.tiny import run, tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by one device."""
    folder = tmp_path_factory.mktemp("alone")
    assert run(folder, tiny_config()) == 12
    return folder


def assert_same_losses(folder: Path, expected: Path) -> None:
    lines, wanted = read_lines(folder / METRICS), read_lines(expected / METRICS)
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, want in zip(lines, wanted, strict=True):
        for name, value in want.items():
            np.testing.assert_allclose(line[name], value, rtol=1e-5, err_msg=f"{name} at step {want['step']}")


@pytest.mark.parametrize(
    "meshes",
    [
        [{"fsdp": 2, "tensor": 2}, {}],
        pytest.param([{"data": 2, "sequence": 2}, {"fsdp": 2, "tensor": 2, "sequence": 2}, {}], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_on_other_meshes(alone: Path, tmp_path: Path, meshes: list[dict[str, int]]) -> None:
    """Dropout, neighbour dropout and all: 4 steps on each mesh but the last one, which is one device and does the others."""
    for done, mesh in ((4 * number, MeshConfig(**sizes)) for number, sizes in enumerate(meshes)):
        for step in range(done + 4, 13, 4):
            shutil.rmtree(tmp_path / "checkpoints" / str(step), ignore_errors=True)
        assert run(tmp_path, tiny_config(mesh, keep=3)) == 12 - done
        model, step = load_model(tmp_path)  # one device reads what several have written
        assert step == 12 and len(model.embedding.table[...].sharding.device_set) == 1
    assert_same_losses(tmp_path, alone)


def test_a_checkpoint_is_not_restored_onto_a_mesh_that_cannot_hold_it(alone: Path, tmp_path: Path) -> None:
    """It is refused before anything is written."""
    folder = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "12")
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=r"heads=2 is not divisible by MeshConfig.tensor=4; change one of them"):
        run(folder, tiny_config(MeshConfig(tensor=4)))
    assert sorted(folder.rglob("*")) == before


def started(folder: Path, count: int, devices: int, **settings: Any) -> list[subprocess.Popen]:
    """Processes that train together, each with so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(REPOSITORY)}
    given = [json.dumps({"processes": [coordinator, count, number], **settings}) for number in range(count)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.tiny", str(folder), own],
            env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for own in given
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str, str]]:
    """Exit code and output of each; whoever takes longer is killed, and that fails the test."""
    deadline = time.monotonic() + seconds
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            results.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (2, 2, {"data": 2, "tensor": 2}),
        pytest.param(4, 2, {"fsdp": 2, "sequence": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(2, 1, {"sequence": 2}, marks=pytest.mark.slow),
        pytest.param(4, 1, {"tensor": 2, "data": 2}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_to_the_same_losses(alone: Path, tmp_path: Path, count: int, devices: int, mesh: dict) -> None:
    """The first one alone tells and writes."""
    results = ended(started(tmp_path, count, devices, mesh=mesh, steps=12), 300)
    assert [code for code, _, _ in results] == [0] * count, results
    assert_same_losses(tmp_path, alone)
    assert not any("tiny" in out + err for _, out, err in results[1:])


@pytest.mark.slow  # the others wait a minute for its heartbeats
def test_the_death_of_one_ends_all_and_the_run_goes_on_elsewhere(alone: Path, tmp_path: Path) -> None:
    processes = started(tmp_path, 2, 2, mesh={"data": 2, "tensor": 2}, wait=0.5)
    deadline = time.monotonic() + 300
    while not (tmp_path / "checkpoints" / "4").is_dir():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    (code, _, _), _ = ended(processes, 2 * HEARTBEAT_SECONDS)
    assert code != 0
    assert run(tmp_path, tiny_config(MeshConfig(fsdp=4))) in (4, 8)
    assert_same_losses(tmp_path, alone)


@pytest.mark.slow
def test_a_request_to_stop_reaches_all(alone: Path, tmp_path: Path) -> None:
    """SIGTERM to one of them: all save the same step and exit 0; the same command goes on."""
    mesh = {"data": 2, "tensor": 2}
    processes = started(tmp_path, 2, 2, mesh=mesh, wait=0.5)
    deadline = time.monotonic() + 300
    while not (tmp_path / METRICS).exists():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    results = ended(processes, 120)
    assert [code for code, _, _ in results] == [0, 0], results
    assert "a checkpoint is saved" in results[0][1]
    assert run(tmp_path, tiny_config(MeshConfig(**mesh))) < 12
    assert_same_losses(tmp_path, alone)
    assert jax.process_count() == 1
