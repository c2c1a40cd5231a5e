"""Chunks -> embedder -> vectors -> index -> neighbours, each an artefact of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retro_jax.artefact import MANIFEST, Artefact, build_artefact
from retro_jax.config import SPLITS, ChunkConfig, RetrievalConfig, Split
from retro_jax.corpus.chunk_table import ChunkTable
from retro_jax.errors import UserError
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.embedder import EMBEDDERS, build_embedder
from retro_jax.retrieval.embedding import build_queries, build_vectors
from retro_jax.retrieval.index import build_index
from retro_jax.retrieval.index_costs import costs_of
from retro_jax.retrieval.neighbour_table import NEIGHBOURS, NeighbourTable
from retro_jax.retrieval.search_stage import search_all
from retro_jax.retrieval.sparse_costs import SAMPLED_CHUNKS, sparse_costs
from retro_jax.retrieval.tfidf import count_ngrams


def build_neighbours(
    config: RetrievalConfig, data_dir: Path, tables: Mapping[Split, ChunkTable], chunks: ChunkConfig
) -> dict[Split, NeighbourTable]:
    """Find the neighbours of every chunk of every split in the train split, or open what stands in ``data_dir``.

    Artefacts: ``embedder``, ``vectors``, ``index``, where ``config`` is not symmetric ``queries``, and ``neighbours`` (per split
    ``<split>.ids.npy`` int64 [chunks, saved] and ``<split>.distances.npy`` float32).

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
    texts = ChunkTexts.of(data_dir, config.context)
    embedder, vectors, index = build_database(config, data_dir)
    queries = vectors if config.symmetric else build_queries(config, texts, embedder, data_dir / "queries")
    neighbours = build_artefact(
        data_dir / NEIGHBOURS,
        kind=NEIGHBOURS,
        settings={"saved": config.saved},
        inputs={"index": index.fingerprint, queries.path.name: queries.fingerprint, **texts.inputs},
        make=lambda folder: search_all(config, texts, index, vectors, queries, folder),
    )
    R = chunks.retrieved_len
    return {split: NeighbourTable(neighbours.path, split, tables[split], tables["train"], R) for split in SPLITS}


def build_database(config: RetrievalConfig, data_dir: Path) -> tuple[Artefact, Artefact, Artefact]:
    """Build what can be searched, ``embedder``, ``vectors`` and ``index``, or open what stands in ``data_dir``;
    :func:`build_neighbours` goes on from it.

    Raises:
        UserError: as :func:`build_neighbours`.
    """
    texts = ChunkTexts.of(data_dir, config.context)
    if not (data_dir / "index" / MANIFEST).exists():
        _say_costs(config, texts)
    embedder = build_embedder(config, texts, data_dir / "embedder")
    vectors = build_vectors(config, texts, embedder, data_dir / "vectors")
    return embedder, vectors, build_index(config, vectors, data_dir / "index")


def _say_costs(config: RetrievalConfig, texts: ChunkTexts) -> None:
    """Before anything is built: what the index will take. That of the sparse one is told from a sample of chunks.

    Raises:
        UserError: more memory than this machine has, faiss is missing, or it does not understand the factory string.
    """
    embedder, chunks = EMBEDDERS[config.embedder], texts.table("train").num_chunks
    if not embedder.sparse:
        dim = embedder.dim_of(config)
        print(f"index of {chunks:,} chunks x {dim}: {costs_of(config, chunks, dim)}", file=sys.stderr)
        return
    sample = np.sort(np.random.default_rng(config.seed).choice(chunks, min(SAMPLED_CHUNKS, chunks), replace=False, shuffle=False))
    counts = count_ngrams(texts.read_found("train", sample), config.features, config.max_ngram)
    print(sparse_costs(config, counts, chunks), file=sys.stderr)
