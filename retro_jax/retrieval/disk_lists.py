"""Inverted lists that lie on disk: parts of the database are assigned to lists in parallel, and the parts' lists are merged."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from retro_jax.blocks import block_arrays, run_blocks
from retro_jax.config import RetrievalConfig
from retro_jax.retrieval.dense_index import LISTS_FILE, import_faiss, one_thread, without_stdout
from retro_jax.retrieval.vectors import DenseVectors

# Vectors that are added to an index at a time, and the least of a part.
ADD_AT_ONCE = 131_072
ID_BYTES = 8
# Inverted lists of these can be merged on disk; the others of their kind pack or refine their codes in memory.
ON_DISK_TYPES = ("IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer")


def goes_to_disk(faiss: ModuleType, index: Any) -> bool:
    """Whether the lists of an index of this kind can be merged on disk."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return type(inner).__name__ in ON_DISK_TYPES


def add_on_disk(faiss: ModuleType, index: Any, trained: Path, database: DenseVectors, config: RetrievalConfig) -> None:
    """Add the database to an empty index, its lists in ``lists.ivfdata`` beside ``trained``, the file of the empty index."""
    from faiss.contrib.ondisk import merge_ondisk

    folder = trained.parent
    size = rows_of_part(faiss, index)
    starts = range(0, len(database), size)
    tasks = ((trained, database, start, min(start + size, len(database))) for start in starts)
    run_blocks(
        folder,
        _assign_block,
        tasks,
        workers=config.workers,
        description="index",
        total=len(starts),
        executor=config.executor,
        describe=lambda task: f"train chunks {task[2]} to {task[3] - 1}",
    )
    parts = [folder / f"part{number}.faiss" for number in range(len(starts))]
    for number, part in enumerate(parts):
        part.write_bytes(block_arrays(folder, number)["index"].tobytes())
    (folder / LISTS_FILE).unlink(missing_ok=True)
    _refuse_full_disk(sum(part.stat().st_size for part in parts), folder / LISTS_FILE)
    with without_stdout():
        merge_ondisk(index, [str(part) for part in parts], str(folder / LISTS_FILE))
    # The index file names the lists' file; it is found beside it, wherever the folder is moved.
    faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists).filename = LISTS_FILE
    for part in parts:
        part.unlink()


def rows_of_part(faiss: ModuleType, index: Any) -> int:
    """A part has a copy of the centroids; its codes are to outweigh them."""
    inverted = faiss.extract_index_ivf(index)
    return max(ADD_AT_ONCE, inverted.nlist * inverted.d * 4 // (inverted.code_size + ID_BYTES))


def _refuse_full_disk(size: int, path: Path) -> None:
    """faiss writes lists into a mapped file; where the disk is full, that ends the process with a signal."""
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _assign_block(trained: Path, database: DenseVectors, start: int, stop: int) -> dict[str, np.ndarray]:
    faiss = import_faiss()
    index = faiss.read_index(str(trained))
    with one_thread(faiss):
        for first in range(start, stop, ADD_AT_ONCE):
            last = min(first + ADD_AT_ONCE, stop)
            index.add_with_ids(database.rows(first, last), np.arange(first, last))
    return {"index": faiss.serialize_index(index)}
