"""The vectors of all chunks on disk: every chunk embedded once, in blocks, read back as memory-mapped rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from retro_jax.artefact import Artefact, build_artefact
from retro_jax.config import SPLITS, RetrievalConfig, Split
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.embedder import Embedder, Vectors, load_embedder
from retro_jax.retrieval.split_blocks import SplitBlocks


@dataclass(frozen=True)
class DenseVectors:
    """float32 [chunks, dim], memory-mapped."""

    path: Path

    @functools.cached_property
    def vectors_ND(self) -> np.ndarray:
        """The whole array, mapped; a copy in another process maps it anew."""
        return np.load(self.path, mmap_mode="r")

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return DenseVectors, (self.path,)

    def __len__(self) -> int:
        return len(self.vectors_ND)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, in memory."""
        return np.array(self.vectors_ND[start:stop])


@dataclass(frozen=True)
class SparseVectors:
    """The three arrays of a csr_matrix [chunks, dim], memory-mapped; ``row_ends_N`` are running counts from the first row on."""

    data: np.ndarray
    columns: np.ndarray
    row_ends_N: np.ndarray
    dim: int

    def __len__(self) -> int:
        return len(self.row_ends_N)

    def rows(self, start: int, stop: int) -> csr_matrix:
        """Rows ``start`` to ``stop``, in memory."""
        first = int(self.row_ends_N[start - 1]) if start else 0
        last = int(self.row_ends_N[stop - 1]) if stop else 0
        starts = np.concatenate([[0], self.row_ends_N[start:stop] - first]).astype(np.int32)
        data, columns = np.array(self.data[first:last]), np.array(self.columns[first:last])
        return csr_matrix((data, columns, starts), shape=(stop - start, self.dim))


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


def open_vectors(artefact: Artefact, split: Split) -> DenseVectors | SparseVectors:
    """The vectors of one split."""
    if artefact.summary["sparse"]:
        data, columns, row_ends_N = (artefact.array(f"{split}.{name}") for name in ("data", "columns", "row_ends"))
        return SparseVectors(data, columns, row_ends_N, artefact.summary["dim"])
    return DenseVectors(artefact.path / f"{split}.vectors.npy")


def _embed_all(config: RetrievalConfig, texts: ChunkTexts, embedder: Artefact, folder: Path) -> Mapping:
    blocks = SplitBlocks(config, texts)
    blocks.run(folder, _embed_block, embedder.path, embedder.fingerprint, texts, description="vectors")
    model = load_embedder(embedder.path)
    blocks.join(folder, _arrays(model.embed([""])[:0]))
    if model.sparse:
        for split in SPLITS:
            _join_row_ends(folder / f"{split}.row_sizes.npy", folder / f"{split}.row_ends.npy")
    splits = {split: {"chunks": chunks} for split, chunks in blocks.chunks.items()}
    return {"splits": splits, "dim": model.dim, "sparse": model.sparse}


def _embed_block(
    embedder: Path, fingerprint: str, texts: ChunkTexts, split: Split, start: int, stop: int
) -> dict[str, np.ndarray]:
    return _arrays(_loaded(embedder, fingerprint).embed(texts.read(split, np.arange(start, stop))))


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, fingerprint: str) -> Embedder:
    """Once a process; the fingerprint tells an embedder that was built anew in the same folder."""
    del fingerprint
    return load_embedder(path)


def _arrays(vectors: Vectors) -> dict[str, np.ndarray]:
    if isinstance(vectors, csr_matrix):
        sizes = np.diff(vectors.indptr).astype(np.int64)
        return {"data": vectors.data, "columns": vectors.indices.astype(np.int32), "row_sizes": sizes}
    return {"vectors": vectors}


def _join_row_ends(sizes: Path, ends: Path) -> None:
    np.save(ends, np.cumsum(np.load(sizes)))
    sizes.unlink()
