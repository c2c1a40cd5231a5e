"""The training chunks as something to ask: any text's nearest chunks, or documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retro_jax.artefact import Artefact, open_artefact
from retro_jax.corpus.chunk_table import ChunkTable
from retro_jax.corpus.document_names import DocumentNames
from retro_jax.errors import UserError
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.document_search import nearest_documents
from retro_jax.retrieval.embedder import load_embedder
from retro_jax.retrieval.index import open_index
from retro_jax.retrieval.search import nearest_outside


class Database:
    """What stands in ``data_dir``: chunks, embedder, vectors and index, opened and memory-mapped. It needs no neighbour table.

    Attributes:
        texts: the chunks' texts.
        table: the training chunks.
        names: their documents' ids and titles.
        artefacts: "embedder", "vectors" and "index".

    Raises:
        UserError: one of them is missing, or they were not made from each other.
    """

    def __init__(self, data_dir: Path) -> None:
        self.artefacts: dict[str, Artefact] = {}
        embedder = open_artefact(data_dir / "embedder", "embedder")
        self.texts = ChunkTexts.of(data_dir, embedder.manifest["inputs"].get("context", "none"))
        made_from = self.texts.inputs
        for kind in ("embedder", "vectors", "index"):
            self.artefacts[kind] = artefact = open_artefact(data_dir / kind, kind)
            for name, fingerprint in artefact.manifest["inputs"].items():
                if made_from.get(name) != fingerprint:
                    raise UserError(
                        f"{artefact.path} was made from another {name} than stands beside it; rebuild it with "
                        f"`python -m retro_jax prepare --config FILE --rebuild {kind}`"
                    )
            made_from[kind] = artefact.fingerprint
        self.table: ChunkTable = self.texts.table("train")
        self.names = DocumentNames(data_dir / "tokens", "train")
        self._embedder = load_embedder(self.artefacts["embedder"].path)
        self._index = open_index(self.artefacts["index"], self.artefacts["vectors"])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of what answers."""
        return {kind: artefact.fingerprint for kind, artefact in self.artefacts.items()}

    def nearest_chunks(self, texts: list[str], wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """The training chunks nearest to each text: ids int64 [texts, wanted], -1 for none, and distances, inf there."""
        queries = self._embedder.embed_queries(texts)
        nowhere = np.full(len(texts), -1)
        return nearest_outside(self._index, queries, nowhere, self.table.document_N, wanted)

    def nearest_documents(self, texts: list[str], wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See :func:`retro_jax.retrieval.document_search.nearest_documents`."""
        return nearest_documents(self._index, self._embedder.embed_queries(texts), self.table.document_N, wanted)
