"""Long stages in numbered blocks: computed in parallel, stored one by one, continued after a kill with the same bytes."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import numpy as np

from retro_jax.array_files import array_file
from retro_jax.artefact import BLOCKS, write_bytes
from retro_jax.errors import UserError
from retro_jax.progress import progress_bar

Block = Mapping[str, np.ndarray]


def run_blocks(
    folder: Path,
    compute: Callable[..., Block],
    tasks: Iterable[tuple],
    *,
    workers: int,
    description: str,
    total: int | None = None,
) -> int:
    """Store ``compute(*task)`` of the i-th task as block i under ``folder/blocks``; blocks already there are not computed.

    Args:
        folder: the artefact's partial folder.
        compute: a picklable function from a task to named arrays. Its result must depend on the task alone.
        tasks: the tasks, in order; read lazily, so that memory does not grow with their number.
        workers: processes; 1 computes in this process.
        description: for the progress bar.
        total: number of tasks for the progress bar, where known.

    Returns:
        The number of blocks.
    """
    blocks = folder / BLOCKS
    blocks.mkdir(exist_ok=True)
    counted = 0
    with progress_bar(description, total) as bar:

        def missing() -> Iterator[tuple[int, tuple]]:
            nonlocal counted
            for number, task in enumerate(tasks):
                counted += 1
                if (blocks / _done_name(number)).exists():
                    bar.advance()
                else:
                    yield number, task

        if workers == 1:
            for number, task in missing():
                _compute_block(blocks, number, compute, task)
                bar.advance()
        else:
            _run_in_processes(blocks, compute, missing(), workers, bar.advance)
    return counted


def keep_blocks_of(folder: Path, size: int) -> None:
    """Drop the blocks that a killed run left with another block size: they are cut elsewhere. Call it before
    :func:`run_blocks` in a stage whose content does not depend on the size of its blocks."""
    plan = folder / BLOCKS / "size"
    if not plan.exists() or plan.read_text() != str(size):
        shutil.rmtree(folder / BLOCKS, ignore_errors=True)
        (folder / BLOCKS).mkdir()
        write_bytes(plan, str(size).encode())


def block_arrays(folder: Path, number: int) -> dict[str, np.ndarray]:
    """The arrays of one stored block, by name."""
    names = (folder / BLOCKS / _done_name(number)).read_text().split()
    return {name: np.load(folder / BLOCKS / f"{number:07d}.{name}.npy") for name in names}


def concatenate_blocks(folder: Path, count: int, name: str, path: Path, *, first: int = 0) -> np.ndarray:
    """Write the concatenation of the arrays ``name`` of ``count`` blocks, from block ``first`` on, to ``path`` (.npy), a block
    at a time, and return it mapped."""
    if count < 1:
        raise ValueError(f"no blocks to concatenate in {folder}")

    def part(number: int) -> np.ndarray:
        return np.load(folder / BLOCKS / f"{number:07d}.{name}.npy", mmap_mode="r")

    rows = sum(len(part(number)) for number in range(first, first + count))
    like = part(first)
    with array_file(path, like.dtype, (rows, *like.shape[1:])) as append:
        for number in range(first, first + count):
            append(part(number))
    return np.load(path, mmap_mode="r")


def _done_name(number: int) -> str:
    return f"{number:07d}.done"


def _compute_block(blocks: Path, number: int, compute: Callable[..., Block], task: tuple) -> None:
    arrays = compute(*task)
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        write_bytes(blocks / f"{number:07d}.{name}.npy", buffer.getvalue())
    write_bytes(blocks / _done_name(number), " ".join(arrays).encode())


def _run_in_processes(
    blocks: Path, compute: Callable[..., Block], numbered: Iterator[tuple[int, tuple]], workers: int, advance: Callable[[], None]
) -> None:
    first = list(islice(numbered, workers + 1))
    if not first:
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(first)), mp_context=spawn, initializer=die_with, initargs=(os.getpid(),)) as pool:
        try:
            running = {pool.submit(_compute_block, blocks, n, compute, task) for n, task in first}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    advance()
                for n, task in islice(numbered, len(done)):
                    running.add(pool.submit(_compute_block, blocks, n, compute, task))
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (out of memory?); run again to continue where it stopped, "
                "with fewer workers if it dies again"
            ) from None
        except BaseException as error:
            # After an ordinary exception nothing may write into the folder any more: the caller may remove it.
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            raise


def die_with(parent: int) -> None:
    """End this worker when its parent is gone: a killed run must leave no process behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
