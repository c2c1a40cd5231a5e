"""Stored blocks: what was changed after it was stored is named, computed anew, and never used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from retro_jax.artefact import PLAN, build_artefact, is_as_noted, write_noted
from retro_jax.blocks import block_arrays, concatenate_blocks, run_blocks
from retro_jax.errors import UserError
from tests.executor.computed import calls, numbers

BLOCKS = 4
Harm = Callable[[Path], object]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zero(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    """The file of another block, whole in itself."""
    shutil.copy(path.with_name(path.name.replace("0000002", "0000001")), path)


HARMS = [flip, truncate, zero, empty, swap, Path.unlink]


def store(folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    tasks = [(number, folder.parent) for number in range(BLOCKS)]
    return run_blocks(folder, numbers, tasks, workers=1, description="numbers", describe=lambda task: f"number {task[0]}")


def joined(folder: Path) -> dict[str, bytes]:
    for name in ("a", "b"):
        concatenate_blocks(folder, BLOCKS, name, folder / f"{name}.npy")
    return {name: (folder / f"{name}.npy").read_bytes() for name in ("a", "b")}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "a"
    store(folder)
    return folder


@pytest.mark.parametrize("name", ["a.npy", "b.npy", "done"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_block_is_computed_anew(
    harm: Harm, name: str, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = joined(stored), shutil.copytree(stored, tmp_path / "a")
    path = folder / "blocks" / f"0000002.{name}"
    harm(path)
    assert store(folder) == BLOCKS
    assert [calls(tmp_path, number) for number in range(BLOCKS)] == [0, 0, 1, 0]
    told = capsys.readouterr().err
    if (harm, name) != (Path.unlink, "done"):  # a block that is not done is none
        # A note that is whole in itself, but another block's, tells of other bytes.
        assert "numbers: block 2 (number 2) is not taken up, it is computed anew" in told
        assert str(path if (harm, name) != (swap, "done") else folder / "blocks" / "0000002.a.npy") in told
    assert joined(folder) == whole


@pytest.mark.parametrize("harm", HARMS)
def test_a_block_that_is_harmed_before_it_is_read_is_not_used(harm: Harm, stored: Path, tmp_path: Path) -> None:
    whole, folder = joined(stored), shutil.copytree(stored, tmp_path / "a")
    harm(folder / "blocks" / "0000002.a.npy")
    with pytest.raises(UserError, match=r"0000002\.a\.npy .*; run again, which computes block 2 anew"):
        concatenate_blocks(folder, BLOCKS, "a", folder / "a.npy")
    with pytest.raises(UserError, match=r"0000002\.a\.npy .*; run again"):
        block_arrays(folder, 2)
    np.testing.assert_array_equal(block_arrays(folder, 1)["a"], np.arange(10, 20))
    store(folder)
    assert joined(folder) == whole


def test_blocks_of_an_older_version_are_computed_anew(tmp_path: Path) -> None:
    store(tmp_path / "a")
    (tmp_path / "a" / "blocks" / "0000002.done").write_text("a b")
    store(tmp_path / "a")
    assert [calls(tmp_path, number) for number in range(BLOCKS)] == [1, 1, 2, 1]


def test_an_artefact_ends_whole_after_harm_in_the_middle(tmp_path: Path) -> None:
    """A kill between the blocks and their joining, harm, and the next run."""

    def make(folder: Path) -> Mapping:
        store(folder)
        if not (tmp_path / "harmed").exists():
            (tmp_path / "harmed").touch()
            flip(folder / "blocks" / "0000001.b.npy")
            raise KeyboardInterrupt
        joined(folder)
        return {}

    def build(path: Path) -> None:
        build_artefact(path, kind="numbers", settings={}, inputs={}, make=make)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "numbers")
    build(tmp_path / "numbers")
    build(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "numbers").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


def test_a_plan_that_cannot_be_read_is_told_and_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(folder: Path) -> Mapping:
        store(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_artefact(tmp_path / "a", kind="numbers", settings={}, inputs={}, make=stop)
    (tmp_path / "a.partial" / PLAN).write_bytes(b'{"kind": "numbers", "sett')
    build_artefact(tmp_path / "a", kind="numbers", settings={}, inputs={}, make=lambda folder: {"blocks": store(folder)})
    assert "plan.json is corrupted" in capsys.readouterr().err
    assert [calls(tmp_path, number) for number in range(BLOCKS)] == [2] * BLOCKS


@pytest.mark.parametrize("harm", [flip, truncate, empty])
def test_a_noted_file_is_as_it_was_written(harm: Harm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trained"
    assert not is_as_noted(path)
    write_noted(path, b"some bytes")
    assert is_as_noted(path) and capsys.readouterr().err == ""
    harm(path)
    assert not is_as_noted(path) and "trained is corrupted" in capsys.readouterr().err
