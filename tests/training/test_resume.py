"""A run that was stopped or killed, wherever, ends in the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from retro_jax.data.batch import Batch
from retro_jax.training.checkpoint import Checkpoints, load_model
from retro_jax.training.loop import Job, fit
from tests.training.tiny import random_batch, run, tiny_batches, tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]


def assert_equal_runs(one: Path, other: Path) -> None:
    """The same loss curve byte for byte, and the same numbers in every array of the last checkpoint."""
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    digests = []
    for folder in (one, other):
        with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
            about = checkpoints.about(checkpoints.find("latest"))
            assert about.step == 12
            digests.append(about.digests)
    assert digests[0] == digests[1] and len(digests[0]) > 80


def start(folder: Path, **settings: object) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "tests.training.tiny", str(folder), json.dumps(settings)]
    # With as many devices as there are here, what is compiled here need not be compiled there.
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: object, process: subprocess.Popen[str], seconds: float = 300.0) -> None:
    ends = time.monotonic() + seconds
    while not condition() and process.poll() is None:  # type: ignore[operator]
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("stop_at", "number"),
    [pytest.param(2, signal.SIGINT, marks=pytest.mark.slow), (6, signal.SIGTERM), (8, signal.SIGTERM)],
)
def test_a_signal_saves_and_the_next_run_continues(
    stop_at: int, number: signal.Signals, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes while a step is validated: step 8 is saved anyway, 2 and 6 for the signal alone."""
    validations = []

    def valid() -> Iterator[tuple[Batch, np.ndarray]]:
        validations.append(1)
        if len(validations) * 2 == stop_at:
            os.kill(os.getpid(), number)
        yield from (random_batch(9999), random_batch(9998))

    config = tiny_config()
    job = Job(name="tiny", config=config, model=config.model, folder=tmp_path)
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as stopped:
        fit(job, tiny_batches(), valid)
    if number == signal.SIGTERM:
        assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert f"stopped at step {stop_at} of 12, a checkpoint is saved; run the same command again to continue" in told
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(tmp_path, config) == 12 - stop_at
    assert f"continues at step {stop_at} of 12" in capsys.readouterr().out
    assert_equal_runs(whole_run, tmp_path)


def test_sigterm_exits_0_and_tells_how_to_continue(whole_run: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "run", wait=0.3)
    wait_for(
        lambda: (tmp_path / "run" / "metrics.jsonl").exists() and (tmp_path / "run" / "metrics.jsonl").stat().st_size, process
    )
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 0
    assert "run the same command again to continue" in output and "Traceback" not in output
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as checkpoints:
        assert 2 <= checkpoints.find("latest") < 12
    assert run(tmp_path / "run", tiny_config()) > 0
    assert_equal_runs(whole_run, tmp_path / "run")


def test_a_finished_run_has_nothing_left_and_more_steps_extend_it(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(tmp_path / "run", tiny_config()) == 0
    assert "all 12 steps are done, nothing is left to do" in capsys.readouterr().out
    assert run(tmp_path / "run", tiny_config(steps=14)) == 2
    assert "TrainConfig.steps was 12, now the run goes on to 14 (the cosine schedule now ends there)" in capsys.readouterr().out
    after = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert after.startswith(before) and json.loads(after.splitlines()[-1])["step"] == 14
    assert load_model(tmp_path / "run")[1] == 14


def test_a_checkpoint_that_finds_no_space_is_told_and_the_run_continues(whole_run: Path, tmp_path: Path) -> None:
    """A write that fails for real: no file may grow beyond 8 KB."""
    process = start(tmp_path / "run", largest_file=8192)
    output = process.communicate()[0]
    assert process.returncode == 2, output
    # Threads of TensorStore, which lost their event loop, may write on the same line.
    told = "file too large; free some space and run the same command again to continue from the start"
    assert re.search(f"error: a checkpoint could not be written to .*: {told}", output), output
    assert run(tmp_path / "run", tiny_config()) == 12
    assert_equal_runs(whole_run, tmp_path / "run")
