"""Builds faiss indexes: chosen by size or named by a factory string, trained on a sample, inverted lists put on disk."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from retro_jax.artefact import is_as_noted, unlink_noted, write_noted
from retro_jax.blocks import block_arrays, run_blocks
from retro_jax.config import RetrievalConfig
from retro_jax.errors import BadInput
from retro_jax.progress import progress_bar
from retro_jax.retrieval.dense_index import (
    INDEX_FILE,
    LISTS_FILE,
    DenseIndex,
    faiss_reason,
    import_faiss,
    make_index,
    one_thread,
    set_search_parameters,
    without_stdout,
)
from retro_jax.retrieval.vectors import DenseVectors

# Up to here an exact scan is fast enough; above the second the vectors themselves are too many to keep in the index.
EXACT_UP_TO = 131_072
VECTORS_UP_TO = 4_194_304
ADD_AT_ONCE = 131_072
RECALL_QUERIES, RECALL_AT = 256, 10
TRAINED_FILE = "trained.faiss"
# Inverted lists of these can be merged on disk; the others of their kind pack or refine their codes in memory.
ON_DISK_TYPES = ("IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer")


def dense_index_settings(config: RetrievalConfig) -> Mapping:
    """The settings that decide the index."""
    return {
        "factory": config.index_factory,
        "search_parameters": config.index_search,
        "train_chunks": config.index_train_chunks,
        "seed": config.seed,
    }


def build_dense_index(config: RetrievalConfig, database: DenseVectors, folder: Path) -> Mapping:
    """Train the index on a random sample, add the database in blocks, measure its recall; writes ``index.faiss``."""
    faiss = import_faiss()
    chunks, dim = database.vectors_ND.shape
    factory, why = (config.index_factory, "as configured") if config.index_factory != "auto" else automatic_factory(chunks, dim)
    index = _trained(faiss, config, factory, database, folder)
    if _goes_to_disk(faiss, index):
        _add_on_disk(faiss, index, config, database, folder)
    else:
        _add_in_memory(faiss, index, factory, database)
    parameters = automatic_parameters(faiss, index) if config.index_search == "auto" else config.index_search
    set_search_parameters(index, parameters)
    _write(faiss, index, folder / INDEX_FILE)
    unlink_noted(folder / TRAINED_FILE)
    facts = {"chunks": chunks, "dim": dim, "factory": factory, "why": why, "search_parameters": parameters}
    if isinstance(faiss.downcast_index(index), faiss.IndexFlat):
        return {**facts, "search": "exact"}
    return {**facts, "search": "approximate", f"recall_at_{RECALL_AT}": _recall(faiss, DenseIndex(index, database), config.seed)}


def automatic_factory(chunks: int, dim: int) -> tuple[str, str]:
    """A faiss factory string for so many vectors, and why."""
    if chunks <= EXACT_UP_TO:
        return "Flat", f"{chunks} chunks, not above {EXACT_UP_TO}: an exact scan is fast enough"
    lists = 2 ** round(math.log2(4 * math.sqrt(chunks)))
    if chunks <= VECTORS_UP_TO:
        return (
            f"IVF{lists},Flat",
            f"{chunks} chunks, not above {VECTORS_UP_TO}: about 4 sqrt(chunks) inverted lists of whole vectors",
        )
    code = next(size for size in (64, 32, 16, 8, 4, 2, 1) if dim % size == 0)
    return (
        f"OPQ{code},IVF{lists}_HNSW32,PQ{code}",
        f"{chunks} chunks, above {VECTORS_UP_TO}: inverted lists found through an HNSW graph, vectors coded in {code} bytes",
    )


def automatic_parameters(faiss: ModuleType, index: Any) -> str:
    """Search parameters in faiss's notation: a sixteenth of the inverted lists, 16 at least and 128 at most."""
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        return f"nprobe={min(inverted.nlist, max(16, min(128, inverted.nlist // 16)))}"
    return "efSearch=128" if isinstance(faiss.downcast_index(index), faiss.IndexHNSW) else ""


def _trained(faiss: ModuleType, config: RetrievalConfig, factory: str, database: DenseVectors, folder: Path) -> Any:
    """The empty index, trained once: what a killed run left is taken up."""
    path = folder / TRAINED_FILE
    if is_as_noted(path):
        return faiss.read_index(str(path))
    index = make_index(faiss, factory, database.vectors_ND.shape[1])
    if not index.is_trained:
        sample = min(config.index_train_chunks, len(database))
        ids = np.sort(np.random.default_rng(config.seed).choice(len(database), sample, replace=False, shuffle=False))
        try:
            with one_thread(faiss, "HNSW" in factory):
                index.train(np.array(database.vectors_ND[ids]))
        except RuntimeError as error:
            raise BadInput(
                f"RetrievalConfig.index_factory={factory!r} cannot be trained on {sample} chunks ({faiss_reason(error)}); "
                "use 'auto' or a smaller index"
            ) from None
    write_noted(path, faiss.serialize_index(index).tobytes())
    return index


def _goes_to_disk(faiss: ModuleType, index: Any) -> bool:
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return type(inner).__name__ in ON_DISK_TYPES


def _add_on_disk(faiss: ModuleType, index: Any, config: RetrievalConfig, database: DenseVectors, folder: Path) -> None:
    """Blocks of the database are assigned to inverted lists on their own, and their lists are merged in a file."""
    from faiss.contrib.ondisk import merge_ondisk

    starts = range(0, len(database), ADD_AT_ONCE)
    tasks = ((folder / TRAINED_FILE, database, start, min(start + ADD_AT_ONCE, len(database))) for start in starts)
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


def _write(faiss: ModuleType, index: Any, path: Path) -> None:
    """``faiss.write_index``; a write that fails is the OSError that it is, where faiss has it in a text."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _refuse_full_disk(size: int, path: Path) -> None:
    """faiss writes lists into a mapped file; where the disk is full, that ends the process with a signal."""
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _assign_block(trained: Path, database: DenseVectors, start: int, stop: int) -> dict[str, np.ndarray]:
    faiss = import_faiss()
    index = faiss.read_index(str(trained))
    with one_thread(faiss):
        index.add_with_ids(database.rows(start, stop), np.arange(start, stop))
    return {"index": faiss.serialize_index(index)}


def _add_in_memory(faiss: ModuleType, index: Any, factory: str, database: DenseVectors) -> None:
    """An HNSW graph depends on the order in which threads insert, so it is built by one."""
    with one_thread(faiss, "HNSW" in factory), progress_bar("index", len(database)) as bar:
        for start in range(0, len(database), ADD_AT_ONCE):
            block_ND = database.rows(start, min(start + ADD_AT_ONCE, len(database)))
            index.add(block_ND)
            bar.advance(len(block_ND))


def _recall(faiss: ModuleType, index: DenseIndex, seed: int) -> float:
    """Share of the exact nearest chunks of some random database chunks that the index finds too."""
    chunks = index.num_chunks
    ids = np.sort(np.random.default_rng(seed).choice(chunks, min(RECALL_QUERIES, chunks), replace=False, shuffle=False))
    queries_QD, at = np.array(index.vectors.vectors_ND[ids]), min(RECALL_AT, chunks)
    exact = faiss.ResultHeap(len(ids), at, keep_max=True)
    for start in range(0, chunks, ADD_AT_ONCE):
        block_ND = index.vectors.rows(start, min(start + ADD_AT_ONCE, chunks))
        cosines_QW, place_QW = faiss.knn(queries_QD, block_ND, min(at, len(block_ND)), faiss.METRIC_INNER_PRODUCT)
        exact.add_result(cosines_QW, place_QW + start)
    exact.finalize()
    found, _ = index.search(queries_QD, at)
    return float(np.mean([len(np.intersect1d(a, b)) / at for a, b in zip(exact.I, found, strict=True)]))
