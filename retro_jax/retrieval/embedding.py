"""Embeds chunks in blocks: every one once, or training chunks twice, as what is found and as what searches."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix

from retro_jax.array_files import save_array
from retro_jax.artefact import Artefact, build_artefact
from retro_jax.config import SPLITS, RetrievalConfig, Split
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.embedder import Embedder, load_embedder
from retro_jax.retrieval.split_blocks import SplitBlocks
from retro_jax.retrieval.vectors import Vectors

Side = Literal["found", "searching"]


def build_vectors(config: RetrievalConfig, texts: ChunkTexts, embedder: Artefact, path: Path) -> Artefact:
    """Embed the chunks that are to be found, or open what stands there: those of the train split, and where all are embedded
    alike (``config.symmetric``) those of every split, which search with the same vectors.

    Files of a split: ``<split>.vectors.npy`` if dense; ``<split>.data.npy`` float32, ``<split>.columns.npy`` int32 and
    ``<split>.row_ends.npy`` int64 if sparse.
    """
    splits: tuple[Split, ...] = SPLITS if config.symmetric else ("train",)
    return _build(config, texts, embedder, path, "vectors", "found", splits)


def build_queries(config: RetrievalConfig, texts: ChunkTexts, embedder: Artefact, path: Path) -> Artefact:
    """Embed the chunks of every split as what searches, where that is not what :func:`build_vectors` gives; files as there."""
    return _build(config, texts, embedder, path, "queries", "searching", SPLITS)


def _build(
    config: RetrievalConfig,
    texts: ChunkTexts,
    embedder: Artefact,
    path: Path,
    kind: str,
    side: Side,
    splits: tuple[Split, ...],
) -> Artefact:
    def make(folder: Path) -> Mapping:
        model = load_embedder(embedder.path)
        blocks = SplitBlocks(config, texts, splits)
        arguments = (embedder.path, embedder.fingerprint, texts, side)
        blocks.run(folder, embed_block, *arguments, description=kind, one_process=model.one_process)
        _loaded.cache_clear()
        blocks.join(folder, _no_vectors(model))
        if model.sparse:
            for split in splits:
                _join_row_ends(folder / f"{split}.row_sizes.npy", folder / f"{split}.row_ends.npy")
        counts = {split: {"chunks": blocks.chunks.get(split, 0)} for split in SPLITS}
        return {"splits": counts, "dim": model.dim, "sparse": model.sparse}

    inputs = {"embedder": embedder.fingerprint, **texts.inputs}
    return build_artefact(path, kind=kind, settings={}, inputs=inputs, make=make)


def embed_block(
    embedder: Path, fingerprint: str, texts: ChunkTexts, side: Side, split: Split, start: int, stop: int
) -> dict[str, np.ndarray]:
    """The vectors of one block, by the names of its arrays."""
    model, ids_N = _loaded(embedder, fingerprint), np.arange(start, stop)
    if side == "found":
        return _arrays(model.embed(texts.read_found(split, ids_N)))
    return _arrays(model.embed_queries(texts.read(split, ids_N)))


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, fingerprint: str) -> Embedder:
    """Once a process; the fingerprint tells an embedder that was built anew in the same folder."""
    del fingerprint
    return load_embedder(path)


def _no_vectors(model: Embedder) -> dict[str, np.ndarray]:
    """The arrays of a split without chunks."""
    return _arrays(csr_matrix((0, model.dim), dtype=np.float32) if model.sparse else np.zeros((0, model.dim), np.float32))


def _arrays(vectors: Vectors) -> dict[str, np.ndarray]:
    if isinstance(vectors, csr_matrix):
        sizes = np.diff(vectors.indptr).astype(np.int64)
        return {"data": vectors.data, "columns": vectors.indices.astype(np.int32), "row_sizes": sizes}
    return {"vectors": vectors}


def _join_row_ends(sizes: Path, ends: Path) -> None:
    save_array(ends, np.cumsum(np.load(sizes)))
    sizes.unlink()
