"""Command lines of several processes that cannot be meant: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHERS = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--coordinator a:1", "--coordinator, --processes and --process are given together, or none of them"),
        ("--distributed --process 0", "--coordinator, --processes and --process are given together, or none of them"),
        ("--coordinator a --processes 2 --process 0", "--coordinator a is not HOST:PORT; name the first process's host"),
        ("--coordinator a: --processes 2 --process 0", "--coordinator a: is not HOST:PORT"),
        ("--coordinator a:1 --processes 2 --process 2", "--process 2 is none of --processes 2; number the processes from 0"),
        ("--coordinator a:1 --processes 2 --process -1", "--process -1 is none of --processes 2"),
    ],
)
def test_arguments_that_do_not_say_who_is_who(
    given: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train.py", "--config", "quickstart", "--workdir", str(tmp_path / "run"), *given.split()]
    monkeypatch.setattr(sys, "argv", command)
    assert train.main() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {told}") and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_is_not_there(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    command = [sys.executable, "train.py", "--config", "quickstart", "--workdir", str(tmp_path / "run"), "--distributed"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("error: no launcher was recognised (coordinator_address should be defined); start")
    assert done.stderr.endswith("or give each of them --coordinator HOST:PORT --processes N --process I\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
