"""Two runs in one folder: the second is refused with the first one's name, and a killed one leaves the folder free."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retro_jax.artefact import build_artefact
from retro_jax.errors import UserError
from retro_jax.sole_writer import LOCK, sole_writer
from tests.training.tiny import run, tiny_config

REPOSITORY = Path(__file__).resolve().parents[1]


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    settings = json.dumps({"wait": 0.5})
    first = subprocess.Popen([sys.executable, "-m", "tests.training.tiny", str(tmp_path), settings], cwd=REPOSITORY)
    try:
        while not list(tmp_path.glob("checkpoints/4")):
            assert first.poll() is None
            time.sleep(0.05)
        with pytest.raises(UserError, match=f"{tmp_path} is being written by process {first.pid} on .*; wait until"):
            run(tmp_path, tiny_config())
        assert first.poll() is None
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    with sole_writer(tmp_path):
        pass


def test_two_builds_of_one_artefact(tmp_path: Path) -> None:
    path = tmp_path / "made"

    def make(folder: Path) -> dict:
        with pytest.raises(UserError, match=f"made.partial is being written by process {os.getpid()} on"):
            build_artefact(path, kind="made", settings={}, inputs={}, make=lambda _: {})
        (folder / "numbers").write_text("1 2 3")
        return {}

    artefact = build_artefact(path, kind="made", settings={}, inputs={}, make=make)
    assert list(artefact.manifest["files"]) == ["numbers"] and not (path / LOCK).exists()


def test_a_folder_that_was_renamed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock and taking it the other process has finished."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: (tmp_path / LOCK).unlink())
    with pytest.raises(UserError, match="has just been finished by another process"), sole_writer(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sole_writer(tmp_path):
        (tmp_path / "written").touch()
    assert "its file system has no locks (No locks available)" in capsys.readouterr().err
