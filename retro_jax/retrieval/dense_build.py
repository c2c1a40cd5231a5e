"""Builds faiss indexes: chosen by size or named by a factory string, trained on a sample, inverted lists put on disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from retro_jax.artefact import is_as_noted, unlink_noted, write_noted
from retro_jax.config import RetrievalConfig
from retro_jax.errors import BadInput
from retro_jax.progress import progress_bar
from retro_jax.retrieval.dense_index import (
    INDEX_FILE,
    DenseIndex,
    faiss_reason,
    import_faiss,
    make_index,
    one_thread,
    set_search_parameters,
)
from retro_jax.retrieval.disk_lists import ADD_AT_ONCE, add_on_disk, goes_to_disk
from retro_jax.retrieval.exact_index import EXACT, ExactIndex
from retro_jax.retrieval.faiss_gpus import cluster_on_gpus
from retro_jax.retrieval.index_choice import chosen_factory
from retro_jax.retrieval.index_recall import RECALL_AT, RecallSample, enough_recall
from retro_jax.retrieval.metric import longest_vector
from retro_jax.retrieval.vectors import DenseVectors

TRAINED_FILE = "trained.faiss"


def dense_index_settings(config: RetrievalConfig) -> Mapping:
    """The settings that decide the index."""
    settings = {
        "factory": config.index_factory,
        "search_parameters": config.index_search,
        "train_chunks": config.index_train_chunks,
        "seed": config.seed,
    }
    return settings if config.metric == "cosine" else {**settings, "metric": config.metric}  # 0.1.0 had no other


def build_dense_index(config: RetrievalConfig, database: DenseVectors, folder: Path) -> Mapping:
    """Train the index on a random sample, add the database in blocks, measure its recall; writes ``index.faiss``, and nothing
    for the index that has nothing but the vectors."""
    chunks, dim = database.vectors_ND.shape
    longest = longest_vector(config.metric, database)
    factory, why = chosen_factory(config.index_factory, chunks, dim)
    facts = {"chunks": chunks, "dim": dim, "factory": factory, "why": why, "metric": config.metric, "longest": longest}
    exact = ExactIndex(database, config.metric, longest)
    if factory == EXACT:
        return {**facts, "search": "exact"}
    faiss = import_faiss()
    index = _trained(faiss, config, factory, database, folder)
    if goes_to_disk(faiss, index):
        add_on_disk(faiss, index, folder / TRAINED_FILE, database, config)
    else:
        _add_in_memory(faiss, index, factory, database)
    parameters = automatic_parameters(faiss, index) if config.index_search == "auto" else config.index_search
    set_search_parameters(index, parameters)
    made = DenseIndex(index, database, config.metric, longest, parameters)
    if isinstance(faiss.downcast_index(index), faiss.IndexFlat):
        found: dict[str, Any] = {"search": "exact"}
    else:
        sample = RecallSample.of(exact, config.seed)
        made, recall = enough_recall(made, sample) if config.index_search == "auto" else (made, sample.recall(made))
        found = {"search": "approximate", f"recall_at_{RECALL_AT}": round(recall, 4), "recall_queries": len(sample.ids_Q)}
    set_search_parameters(index, made.parameters)
    _write(faiss, index, folder / INDEX_FILE)
    unlink_noted(folder / TRAINED_FILE)
    return {**facts, "search_parameters": made.parameters, "candidates": made.candidates, **found}


def automatic_parameters(faiss: ModuleType, index: Any) -> str:
    """Search parameters in faiss's notation to begin with: a sixteenth of the inverted lists, 16 at least and 128 at most."""
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        return f"nprobe={min(inverted.nlist, max(16, min(128, inverted.nlist // 16)))}"
    return "efSearch=128" if isinstance(faiss.downcast_index(index), faiss.IndexHNSW) else ""


def _trained(faiss: ModuleType, config: RetrievalConfig, factory: str, database: DenseVectors, folder: Path) -> Any:
    """The empty index, trained once: what a killed run left is taken up."""
    path = folder / TRAINED_FILE
    if is_as_noted(path):
        return faiss.read_index(str(path))
    index = make_index(faiss, factory, database.vectors_ND.shape[1], config.metric)
    if not index.is_trained:
        sample = min(config.index_train_chunks, len(database))
        ids = np.sort(np.random.default_rng(config.seed).choice(len(database), sample, replace=False, shuffle=False))
        try:
            kept = cluster_on_gpus(faiss, index)
            with one_thread(faiss, "HNSW" in factory):
                index.train(np.array(database.vectors_ND[ids]))
        except RuntimeError as error:
            raise BadInput(
                f"RetrievalConfig.index_factory={factory!r} cannot be trained on {sample} chunks ({faiss_reason(error)}); "
                "use 'auto' or a smaller index"
            ) from None
        del kept
    write_noted(path, faiss.serialize_index(index).tobytes())
    return index


def _write(faiss: ModuleType, index: Any, path: Path) -> None:
    """``faiss.write_index``; a write that fails is the OSError that it is, where faiss has it in a text."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _add_in_memory(faiss: ModuleType, index: Any, factory: str, database: DenseVectors) -> None:
    """An HNSW graph depends on the order in which threads insert, so it is built by one."""
    with one_thread(faiss, "HNSW" in factory), progress_bar("index", len(database)) as bar:
        for start in range(0, len(database), ADD_AT_ONCE):
            block_ND = database.rows(start, min(start + ADD_AT_ONCE, len(database)))
            index.add(block_ND)
            bar.advance(len(block_ND))
