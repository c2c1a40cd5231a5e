"""Chunks -> embedder -> vectors -> index -> neighbours, each an artefact of its own."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from retro_jax.artefact import MANIFEST, Artefact, build_artefact, open_artefact
from retro_jax.config import SPLITS, ChunkConfig, RetrievalConfig, Split
from retro_jax.corpus.chunk_table import ChunkTable
from retro_jax.errors import UserError
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.embedder import EMBEDDERS, build_embedder
from retro_jax.retrieval.index import DISTANCE, Index, build_index, check_index, open_index
from retro_jax.retrieval.memory import in_words
from retro_jax.retrieval.neighbour_table import NEIGHBOURS, ROWS_AT_ONCE, NeighbourTable
from retro_jax.retrieval.search import nearest_outside
from retro_jax.retrieval.sparse_index import refuse_too_large
from retro_jax.retrieval.split_blocks import SplitBlocks
from retro_jax.retrieval.tfidf import count_ngrams
from retro_jax.retrieval.vectors import DenseVectors, SparseVectors, build_vectors, open_vectors

SAMPLED_CHUNKS = 4096


def build_neighbours(
    config: RetrievalConfig, data_dir: Path, tables: Mapping[Split, ChunkTable], chunks: ChunkConfig
) -> dict[Split, NeighbourTable]:
    """Find the neighbours of every chunk of every split in the train split, or open what stands in ``data_dir``.

    Artefacts: ``embedder``, ``vectors``, ``index``, ``neighbours`` (per split ``<split>.ids.npy`` int64 [chunks, saved] and
    ``<split>.distances.npy`` float32).

    Args:
        config: embedder, index, and how many neighbours are saved.
        data_dir: holds ``tokenizer``, ``tokens`` and ``chunks``.
        tables: the chunk tables of ``data_dir``.
        chunks: how many neighbours will be read, and how long they are; the artefacts do not depend on it.

    Raises:
        UserError: the train split has no more chunks than neighbours are wanted, the index does not fit into memory or is
            none that faiss knows, or what stands in ``data_dir`` was built with other settings or from another corpus.
    """
    data_dir = Path(data_dir)
    database = tables["train"].num_chunks
    if database < chunks.num_neighbours:
        raise UserError(
            f"the train split has {database} chunks, fewer than ChunkConfig.num_neighbours={chunks.num_neighbours}; "
            "give more documents, or lower num_neighbours"
        )
    texts = ChunkTexts.of(data_dir)
    if not (data_dir / "index" / MANIFEST).exists():
        check_index(config)
        _say_memory(config, texts)
    embedder = build_embedder(config, texts, data_dir / "embedder")
    vectors = build_vectors(config, texts, embedder, data_dir / "vectors")
    index = build_index(config, vectors, data_dir / "index")
    neighbours = build_artefact(
        data_dir / NEIGHBOURS,
        kind=NEIGHBOURS,
        settings={"saved": config.saved},
        inputs={"index": index.fingerprint, "vectors": vectors.fingerprint, **texts.inputs},
        make=lambda folder: _search_all(config, texts, index, vectors, folder),
    )
    R = chunks.retrieved_len
    return {split: NeighbourTable(neighbours.path, split, tables[split], tables["train"], R) for split in SPLITS}


@dataclass(frozen=True)
class _Searched:
    """What a worker opens once: names only, so that it travels to other processes."""

    texts: ChunkTexts
    index: Path
    vectors: Path
    fingerprint: str


def _search_all(config: RetrievalConfig, texts: ChunkTexts, index: Artefact, vectors: Artefact, folder: Path) -> Mapping:
    blocks = SplitBlocks(config, texts)
    searched = _Searched(texts, index.path, vectors.path, index.fingerprint)
    blocks.run(folder, _search_block, searched, config.saved, description="neighbours")
    none: dict[str, np.ndarray] = {
        "ids": np.zeros((0, config.saved), np.int64),
        "distances": np.zeros((0, config.saved), np.float32),
    }
    blocks.join(folder, none)
    splits = {split: _counts(np.load(folder / f"{split}.ids.npy", mmap_mode="r")) for split in SPLITS}
    facts = {name: index.summary[name] for name in ("search", "factory", "why", "search_parameters") if name in index.summary}
    return {"splits": splits, "database": blocks.chunks["train"], "distance": DISTANCE, **facts}


def _search_block(searched: _Searched, saved: int, split: Split, start: int, stop: int) -> dict[str, np.ndarray]:
    index, vectors = _opened(searched)
    document_N = searched.texts.table("train").document_N
    own_document_Q = np.array(document_N[start:stop]) if split == "train" else np.full(stop - start, -1)
    with threadpool_limits(1):
        ids_QS, distances_QS = nearest_outside(index, vectors[split].rows(start, stop), own_document_Q, document_N, saved)
    return {"ids": ids_QS, "distances": distances_QS}


@functools.lru_cache(maxsize=1)
def _opened(searched: _Searched) -> tuple[Index, dict[Split, DenseVectors | SparseVectors]]:
    vectors = open_artefact(searched.vectors, "vectors")
    return open_index(open_artefact(searched.index, "index"), vectors), {split: open_vectors(vectors, split) for split in SPLITS}


def _counts(ids_NS: np.ndarray) -> dict[str, int]:
    """Chunks, and how many of them have fewer neighbours than are saved, or none."""
    short, without = 0, 0
    for start in range(0, len(ids_NS), ROWS_AT_ONCE):
        missing_NS = ids_NS[start : start + ROWS_AT_ONCE] < 0
        short, without = short + int(missing_NS[:, -1].sum()), without + int(missing_NS[:, 0].sum())
    return {"chunks": len(ids_NS), "short": short, "without": without}


def _say_memory(config: RetrievalConfig, texts: ChunkTexts) -> None:
    """Before anything is built: what the sparse index will take, told from a sample of chunks.

    Raises:
        UserError: more than this machine has.
    """
    if not EMBEDDERS[config.embedder].sparse:
        return
    chunks = texts.table("train").num_chunks
    sample = np.sort(np.random.default_rng(config.seed).choice(chunks, min(SAMPLED_CHUNKS, chunks), replace=False, shuffle=False))
    entries = int(count_ngrams(texts.read("train", sample), config.features, config.max_ngram).nnz * (chunks / len(sample)))
    needed = refuse_too_large(entries, chunks, config.workers)
    print(f"the exact index of {chunks:,} chunks takes about {in_words(needed)} of memory", file=sys.stderr)
