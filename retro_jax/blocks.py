"""Long stages in numbered blocks: computed in parallel, stored one by one, continued after a kill with the same bytes.

A block is its arrays' files and a ``.done`` file, written last, that notes size and SHA-256 of each. Blocks are read only where
they are as noted: one that is not is named, and computed anew.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from retro_jax.array_files import array_file
from retro_jax.artefact import BLOCKS, write_bytes
from retro_jax.config import ExecutorConfig
from retro_jax.errors import UserError
from retro_jax.executor.attempts import compute_all, failures_in_words
from retro_jax.executor.crew import Crew, InThisProcess, Store
from retro_jax.executor.processes import Processes
from retro_jax.progress import progress_bar

Block = Mapping[str, np.ndarray]
LOCAL = ExecutorConfig()


class _NotAsNoted(Exception):
    """A block's files are not those that were stored; the text names the first and says how it differs."""


def run_blocks(
    folder: Path,
    compute: Callable[..., Block],
    tasks: Iterable[tuple],
    *,
    workers: int,
    description: str,
    total: int | None = None,
    executor: ExecutorConfig = LOCAL,
    gpus: float = 0.0,
    describe: Callable[[tuple], str] = str,
) -> int:
    """Store ``compute(*task)`` of the i-th task as block i under ``folder/blocks``; blocks already there are not computed.

    Args:
        folder: the artefact's partial folder.
        compute: a picklable function from a task to named arrays. Its result must depend on the task alone.
        tasks: the tasks, in order; read lazily, so that memory does not grow with their number.
        workers: how many blocks are computed at a time; of the local executor 1 computes in this process.
        description: for the progress bar.
        total: number of tasks for the progress bar, where known.
        executor: who computes, and how often a block may fail.
        gpus: what an actor of Ray asks for.
        describe: what a task covers, for the message about a block that fails.

    Returns:
        The number of blocks.

    Raises:
        UserError: blocks failed ``executor.attempts`` times (all others are stored), or ``compute`` raised one (which ends the
            run at once, like a full disk).
    """
    blocks = folder / BLOCKS
    blocks.mkdir(exist_ok=True)
    stored = {path.name for path in blocks.iterdir()}
    counted = 0
    with progress_bar(description, total) as bar:

        def missing() -> Iterator[tuple[int, tuple]]:
            nonlocal counted
            for number, task in enumerate(tasks):
                counted += 1
                if _done_name(number) in stored and _is_whole(blocks, number, f"{description}: block {number}", describe, task):
                    bar.advance()
                else:
                    yield number, task

        failures = compute_all(
            _crew(executor, workers, functools.partial(_store_block, blocks, compute), blocks, gpus),
            missing(),
            attempts=executor.attempts,
            description=description,
            describe=describe,
            advance=bar.advance,
        )
    if failures:
        raise UserError(failures_in_words(failures, executor.attempts, description)) from failures[0].error
    return counted


def keep_blocks_of(folder: Path, size: int) -> None:
    """Drop the blocks that a killed run left with another block size: they are cut elsewhere. Call it before
    :func:`run_blocks` in a stage whose content does not depend on the size of its blocks."""
    plan = folder / BLOCKS / "size"
    if not plan.exists() or plan.read_bytes() != str(size).encode():
        shutil.rmtree(folder / BLOCKS, ignore_errors=True)
        (folder / BLOCKS).mkdir()
        write_bytes(plan, str(size).encode())


def block_arrays(folder: Path, number: int) -> dict[str, np.ndarray]:
    """The arrays of one stored block, by name.

    Raises:
        UserError: a file is not the one that was stored.
    """
    with _told(number):
        noted = _noted(folder / BLOCKS, number)
        return {name: np.load(_as_noted(folder / BLOCKS, number, name, facts)) for name, facts in noted.items()}


def concatenate_blocks(folder: Path, count: int, name: str, path: Path, *, first: int = 0) -> np.ndarray:
    """Write the concatenation of the arrays ``name`` of ``count`` blocks, from block ``first`` on, to ``path`` (.npy), a block
    at a time, and return it mapped.

    Raises:
        UserError: a file is not the one that was stored.
    """
    if count < 1:
        raise ValueError(f"no blocks to concatenate in {folder}")

    def facts(number: int) -> Mapping:
        with _told(number):
            return _noted(folder / BLOCKS, number)[name]

    def part(number: int) -> np.ndarray:
        with _told(number):
            return np.load(_as_noted(folder / BLOCKS, number, name, facts(number)), mmap_mode="r")

    rows = sum(facts(number)["rows"] for number in range(first, first + count))
    like = part(first)
    with array_file(path, like.dtype, (rows, *like.shape[1:])) as append:
        for number in range(first, first + count):
            append(part(number))
    return np.load(path, mmap_mode="r")


@contextmanager
def _told(number: int) -> Iterator[None]:
    """A stored block that turns out to be corrupted while it is read ends the run; the next one computes it anew."""
    try:
        yield
    except _NotAsNoted as problem:
        raise UserError(f"{problem}; run again, which computes block {number} anew") from None


def _done_name(number: int) -> str:
    return f"{number:07d}.done"


def _array_path(blocks: Path, number: int, name: str) -> Path:
    return blocks / f"{number:07d}.{name}.npy"


def _crew(executor: ExecutorConfig, workers: int, store: Store, blocks: Path, gpus: float) -> Crew:
    if executor.kind == "ray":
        from retro_jax.executor.ray_actors import RayActors

        return RayActors(workers, store, executor, blocks, gpus)
    return InThisProcess(store) if workers == 1 else Processes(workers, store)


def _store_block(blocks: Path, compute: Callable[..., Block], number: int, task: tuple) -> None:
    arrays, facts = compute(*task), {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        data = buffer.getbuffer()
        facts[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": len(array)}
        write_bytes(_array_path(blocks, number, name), data)
    note = json.dumps(facts)
    write_bytes(blocks / _done_name(number), f"{_digest(note)}\n{note}".encode())


def _is_whole(blocks: Path, number: int, block: str, describe: Callable[[tuple], str], task: tuple) -> bool:
    """Whether a block that an earlier run stored may be taken up; if not, says so."""
    try:
        for name, facts in _noted(blocks, number).items():
            _as_noted(blocks, number, name, facts)
    except _NotAsNoted as problem:
        print(f"{block} ({describe(task)}) is not taken up, it is computed anew: {problem}", file=sys.stderr)
        (blocks / _done_name(number)).unlink(missing_ok=True)
        return False
    return True


def _noted(blocks: Path, number: int) -> dict[str, Mapping]:
    """Bytes, SHA-256 and rows of each array of a block, by name, from its ``.done`` file, whose first line is the digest of the
    second."""
    path = blocks / _done_name(number)
    try:
        digest, _, note = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    except FileNotFoundError:
        raise _NotAsNoted(f"{path} is not there") from None
    if digest != _digest(note):
        raise _NotAsNoted(f"{path} is corrupted, or of another version of this program")
    return json.loads(note)


def _digest(note: str) -> str:
    return hashlib.sha256(note.encode()).hexdigest()


def _as_noted(blocks: Path, number: int, name: str, facts: Mapping) -> Path:
    """The file of a block's array, if it is the one that was stored."""
    path = _array_path(blocks, number, name)
    try:
        with open(path, "rb") as file:
            size, digest = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise _NotAsNoted(f"{path} is not there") from None
    if size != facts["bytes"]:
        raise _NotAsNoted(f"{path} has {size} bytes instead of {facts['bytes']} (truncated?)")
    if digest != facts["sha256"]:
        raise _NotAsNoted(f"{path} is corrupted (its checksum is not the one that was noted)")
    return path
