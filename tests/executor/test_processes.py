"""Processes of this machine as workers: killed, they are replaced, and the bytes are those of a run that was let be."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from retro_jax.blocks import run_blocks
from retro_jax.config import ChunkConfig, RetrievalConfig
from retro_jax.corpus.chunk_table import open_chunk_tables
from retro_jax.errors import BadInput, UserError
from retro_jax.retrieval.neighbours import build_neighbours
from tests.executor.computed import (
    EndsItsProcess,
    bad_input,
    calls,
    dies_once,
    disk_full,
    numbers,
    poisonous,
    workers,
    workers_killed,
)
from tests.retrieval.conftest import build_corpus
from tests.retrieval.test_neighbours import contents

BLOCKS = 6


def run(folder: Path, compute: Callable, size: int = 2) -> dict[str, bytes]:
    """The files that it stored."""
    folder.mkdir(exist_ok=True)
    tasks = [(number, folder.parent) for number in range(BLOCKS)]
    assert run_blocks(folder, compute, tasks, workers=size, description="numbers", describe=lambda t: f"number {t[0]}") == BLOCKS
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "blocks").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return run(tmp_path_factory.mktemp("whole") / "a", numbers, size=1)


def no_worker_is_left(marks: Path) -> bool:
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, workers(marks) - {os.getpid()})) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(psutil.pid_exists, workers(marks) - {os.getpid()}))


def test_a_killed_worker_is_replaced(whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "a", dies_once) == whole
    assert [calls(tmp_path, number) for number in range(BLOCKS)] == [1, 1, 2, 1, 1, 1]
    assert len(workers(tmp_path)) >= 2 and no_worker_is_left(tmp_path)
    assert (
        "block 2 (number 2): its worker process died (signal 9, Killed; out of memory?); attempt 1 of 3"
        in capsys.readouterr().err
    )


def test_what_fails_three_times_is_named_and_all_else_is_done(whole: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        run(tmp_path / "a", poisonous)
    message = str(raised.value)
    assert message.startswith("numbers: 2 blocks failed 3 times, all others are finished and kept;")
    assert (
        "block 2 (number 2): its worker process died (signal 9" in message and "block 4 (number 4): KeyError: 'four'" in message
    )
    assert files(tmp_path / "a") == {name: data for name, data in whole.items() if name[:7] not in ("0000002", "0000004")}
    assert [calls(tmp_path, number) for number in range(BLOCKS)] == [1, 1, 3, 1, 3, 1] and no_worker_is_left(tmp_path)
    (tmp_path / "mended").touch()
    assert run(tmp_path / "a", poisonous, size=1) == whole
    assert [calls(tmp_path, number) for number in range(BLOCKS)] == [1, 1, 4, 1, 4, 1]


@pytest.mark.parametrize(("compute", "error"), [(disk_full, OSError), (bad_input, BadInput)])
def test_what_ends_the_run_comes_as_it_was_raised(compute: Callable, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        run(tmp_path / "a", compute)
    assert getattr(raised.value, "errno", errno.ENOSPC) == errno.ENOSPC
    assert "in the worker:\nTraceback" in "".join(raised.value.__notes__) and no_worker_is_left(tmp_path)


@pytest.mark.slow
def test_a_build_with_a_killed_worker_equals_one_that_was_let_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL to the processes that search, as soon as there are blocks of neighbours."""
    corpus, chunks = build_corpus(tmp_path / "corpus"), ChunkConfig(chunk_len=16, num_neighbours=2, retrieved_len=32)
    config = RetrievalConfig(saved=6, features=2**14, block_chunks=4)
    built = {}
    for size in (1, 2):
        data_dir = shutil.copytree(corpus, tmp_path / str(size))
        children = psutil.Process().children
        with workers_killed(data_dir / "neighbours.partial", "spawn_main" if size == 2 else "none", children) as killed:
            build_neighbours(replace(config, workers=size), data_dir, open_chunk_tables(data_dir), chunks)
        built[size] = contents(data_dir)
    assert killed and "its worker process died (signal 9" in capsys.readouterr().err
    assert built[1] == built[2]


def test_workers_that_cannot_start_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 workers one after another .* \(its worker process died \(exit code 7\)\)"):
        run(tmp_path / "a", EndsItsProcess())
