"""Embeds every chunk of every split once, in blocks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from retro_jax.array_files import save_array
from retro_jax.artefact import Artefact, build_artefact
from retro_jax.config import SPLITS, RetrievalConfig, Split
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.embedder import Embedder, load_embedder
from retro_jax.retrieval.split_blocks import SplitBlocks
from retro_jax.retrieval.vectors import Vectors


def build_vectors(config: RetrievalConfig, texts: ChunkTexts, embedder: Artefact, path: Path) -> Artefact:
    """Embed every chunk of every split, or open what stands there.

    Files of a split: ``<split>.vectors.npy`` if dense; ``<split>.data.npy`` float32, ``<split>.columns.npy`` int32 and
    ``<split>.row_ends.npy`` int64 if sparse.
    """
    return build_artefact(
        path,
        kind="vectors",
        settings={},
        inputs={"embedder": embedder.fingerprint, **texts.inputs},
        make=lambda folder: _embed_all(config, texts, embedder, folder),
    )


def _embed_all(config: RetrievalConfig, texts: ChunkTexts, embedder: Artefact, folder: Path) -> Mapping:
    model = load_embedder(embedder.path)
    blocks = SplitBlocks(config, texts)
    blocks.run(
        folder, embed_block, embedder.path, embedder.fingerprint, texts, description="vectors", one_process=model.one_process
    )
    _loaded.cache_clear()
    blocks.join(folder, _no_vectors(model))
    if model.sparse:
        for split in SPLITS:
            _join_row_ends(folder / f"{split}.row_sizes.npy", folder / f"{split}.row_ends.npy")
    splits = {split: {"chunks": chunks} for split, chunks in blocks.chunks.items()}
    return {"splits": splits, "dim": model.dim, "sparse": model.sparse}


def embed_block(
    embedder: Path, fingerprint: str, texts: ChunkTexts, split: Split, start: int, stop: int
) -> dict[str, np.ndarray]:
    """The vectors of one block, by the names of its arrays."""
    return _arrays(_loaded(embedder, fingerprint).embed(texts.read(split, np.arange(start, stop))))


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
