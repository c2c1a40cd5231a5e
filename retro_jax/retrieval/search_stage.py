"""Searches for the neighbours of every chunk of every split, in blocks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from retro_jax.artefact import Artefact, open_artefact
from retro_jax.config import SPLITS, RetrievalConfig, Split
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.exact_index import devices_in_words
from retro_jax.retrieval.index import Index, distance_of, is_exact, one_process, open_index
from retro_jax.retrieval.neighbour_facts import sampled_facts
from retro_jax.retrieval.neighbour_table import ROWS_AT_ONCE
from retro_jax.retrieval.search import nearest_outside
from retro_jax.retrieval.split_blocks import SplitBlocks
from retro_jax.retrieval.vectors import DenseVectors, SparseVectors, open_vectors


@dataclass(frozen=True)
class Searched:
    """What a worker opens once: names only, so that it travels to other processes."""

    texts: ChunkTexts
    index: Path
    vectors: Path
    queries: Path
    fingerprint: str


def search_all(
    config: RetrievalConfig, texts: ChunkTexts, index: Artefact, vectors: Artefact, queries: Artefact, folder: Path
) -> Mapping:
    """Search the neighbours of every chunk of every split by its vector in ``queries``, in blocks; writes ``<split>.ids.npy`` and
    ``<split>.distances.npy`` and returns facts for the manifest."""
    if is_exact(index):
        print(f"neighbours are searched exactly on {devices_in_words()}", file=sys.stderr)
    blocks = SplitBlocks(config, texts)
    searched = Searched(texts, index.path, vectors.path, queries.path, index.fingerprint)
    blocks.run(folder, search_block, searched, config.saved, description="neighbours", one_process=one_process(index))
    none: dict[str, np.ndarray] = {
        "ids": np.zeros((0, config.saved), np.int64),
        "distances": np.zeros((0, config.saved), np.float32),
    }
    blocks.join(folder, none)
    splits = {split: _counts(np.load(folder / f"{split}.ids.npy", mmap_mode="r")) for split in SPLITS}
    told = ("search", "factory", "why", "search_parameters", "candidates", "recall_at_20")
    facts = {name: index.summary[name] for name in told if name in index.summary}
    sample = sampled_facts(texts, queries, folder, config.seed, symmetric=config.symmetric)
    return {"splits": splits, "database": blocks.chunks["train"], "distance": distance_of(index), **facts, "sample": sample}


def search_block(searched: Searched, saved: int, split: Split, start: int, stop: int) -> dict[str, np.ndarray]:
    """The neighbours of one block: ``ids`` int64 [stop - start, saved] and ``distances`` float32."""
    index, queries = _opened(searched)
    document_N = searched.texts.table("train").document_N
    own_document_Q = np.array(document_N[start:stop]) if split == "train" else np.full(stop - start, -1)
    with threadpool_limits(1):
        ids_QS, distances_QS = nearest_outside(index, queries[split].rows(start, stop), own_document_Q, document_N, saved)
    return {"ids": ids_QS, "distances": distances_QS}


@functools.lru_cache(maxsize=1)
def _opened(searched: Searched) -> tuple[Index, dict[Split, DenseVectors | SparseVectors]]:
    vectors = open_artefact(searched.vectors, "vectors")
    queries = vectors if searched.queries == searched.vectors else open_artefact(searched.queries, "queries")
    return open_index(open_artefact(searched.index, "index"), vectors), {split: open_vectors(queries, split) for split in SPLITS}


def _counts(ids_NS: np.ndarray) -> dict[str, int]:
    """Chunks, and how many of them have fewer neighbours than are saved, or none."""
    short, without = 0, 0
    for start in range(0, len(ids_NS), ROWS_AT_ONCE):
        missing_NS = ids_NS[start : start + ROWS_AT_ONCE] < 0
        short, without = short + int(missing_NS[:, -1].sum()), without + int(missing_NS[:, 0].sum())
    return {"chunks": len(ids_NS), "short": short, "without": without}
