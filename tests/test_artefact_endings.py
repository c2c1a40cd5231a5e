"""An artefact whose building ends at any file operation, or for want of disk, is whole after the next run."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from retro_jax.array_files import array_file, save_array
from retro_jax.artefact import build_artefact, open_artefact, write_text
from retro_jax.blocks import concatenate_blocks, run_blocks
from retro_jax.errors import UserError

OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
BLOCKS = 3


def block(number: int) -> dict[str, np.ndarray]:
    return {"a": np.arange(number * 10, number * 10 + 10), "b": np.full((2, 3), number, np.float32)}


def make(folder: Path) -> Mapping:
    count = run_blocks(folder, block, [(n,) for n in range(BLOCKS)], workers=1, description="blocks")
    for name in ("a", "b"):
        concatenate_blocks(folder, count, name, folder / f"{name}.npy")
    write_text(folder / "words.txt", "some")
    return {"blocks": count}


def build(path: Path) -> dict[str, bytes]:
    build_artefact(path, kind="numbers", settings={"n": BLOCKS}, inputs={}, make=make)
    assert open_artefact(path, "numbers", checksums="all").summary == {"blocks": BLOCKS}
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*")}


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``operations(n)``: from the n-th file operation on, all fail, as if the process were gone: nothing is cleaned up either."""

    def fail_from(last: int) -> None:
        counted: list[int] = []

        def counting(inner: Callable) -> Callable:
            def operation(*arguments: object, **named: object) -> object:
                counted.append(1)
                if len(counted) > last:
                    raise KeyboardInterrupt
                return inner(*arguments, **named)

            return operation

        for name in OPERATIONS:
            monkeypatch.setattr(os, name, counting(getattr(os, name)))

    return fail_from


def test_an_end_at_any_file_operation(operations: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = build(tmp_path / "whole" / "numbers")
    for last in range(200):
        path = tmp_path / str(last) / "numbers"
        path.parent.mkdir()
        operations(last)
        try:
            ended = False
            build(path)
        except KeyboardInterrupt:
            ended = True
        finally:
            monkeypatch.undo()
        assert build(path) == whole
        if not ended:
            break
    assert not ended and last > 30


def test_arrays_are_those_of_numpy(tmp_path: Path) -> None:
    for number, array in enumerate([np.arange(7), np.zeros((0, 4), np.float32), np.ones((3, 2), np.int32), np.arange(8)[::2]]):
        save_array(tmp_path / f"{number}.npy", array)
        np.save(tmp_path / "numpy.npy", array)
        assert (tmp_path / f"{number}.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    with (
        pytest.raises(ValueError, match="is to have 5 rows, 4 were written"),
        array_file(tmp_path / "x", np.int64, (5,)) as append,
    ):
        append(np.arange(4))


def test_a_failed_write_keeps_its_reason(tmp_path: Path) -> None:
    """What ``np.save`` loses: "10000 requested and 496 written"."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError, match="large") as raised:
            save_array(tmp_path / "a.npy", np.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert raised.value.errno == errno.EFBIG


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    build(tmp_path / "numbers")
    with pytest.raises(UserError, match=r"words\.txt is a file; give the folder that holds it, .*numbers$"):
        open_artefact(tmp_path / "numbers" / "words.txt", "numbers")
