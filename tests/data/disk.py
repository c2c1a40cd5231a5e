"""Chunk and neighbour tables on disk, from documents given as lists of token ids."""

from __future__ import annotations

import numpy as np

from retro_jax.artefact import build_artefact
from retro_jax.config import SPLITS, ChunkConfig
from retro_jax.corpus.chunk_table import build_chunks, open_chunk_tables
from retro_jax.corpus.token_store import TokenStoreWriter
from retro_jax.retrieval.neighbour_table import NeighbourTable
from tests.data.memory import EOD


def write_tables(folder, documents, chunk_len, sources=None):
    """The chunk tables of ``documents`` by split; ``sources`` gives each split's number of documents by source."""
    sources = sources or {split: [len(listed)] for split, listed in documents.items()}
    count = max(len(counts) for counts in sources.values())

    def write(path):
        for split in SPLITS:
            bounds = np.cumsum([0, *sources.get(split, [0] * count)])
            for source in range(count):
                with TokenStoreWriter(path / f"{source}-{split}", np.dtype(np.uint16)) as writer:
                    for document in documents.get(split, [])[bounds[source] : bounds[source + 1]]:
                        writer.add(np.array([*document, EOD], np.uint16), np.array([len(document) + 1]))
        return {"eod": EOD, "sources": [{"name": f"{i}.jsonl"} for i in range(count)]}

    build_artefact(folder / "tokens", kind="tokens", settings={}, inputs={}, make=write)
    build_chunks(ChunkConfig(chunk_len=chunk_len, retrieved_len=2 * chunk_len), folder)
    return open_chunk_tables(folder)


def write_neighbours(folder, ids, tables, retrieved_len):
    """The neighbour tables of ``ids`` by split."""

    def write(path):
        for split, ids_NS in ids.items():
            np.save(path / f"{split}.ids.npy", np.asarray(ids_NS, np.int64))
            np.save(path / f"{split}.distances.npy", np.zeros(np.shape(ids_NS), np.float32))
        return {}

    build_artefact(folder / "neighbours", kind="neighbours", settings={}, inputs={}, make=write)
    return {split: NeighbourTable(folder / "neighbours", split, tables[split], tables["train"], retrieved_len) for split in ids}
