"""What turns chunks into vectors: the seam, and the embedders that stand behind it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol, Self

from retro_jax.artefact import Artefact, build_artefact, open_artefact
from retro_jax.config import RetrievalConfig
from retro_jax.retrieval.bert import BertEmbedder
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.lsa import LsaEmbedder
from retro_jax.retrieval.tfidf import TfidfEmbedder
from retro_jax.retrieval.vectors import Vectors


class Embedder(Protocol):
    """Text -> vectors of unit length (where an encoder's are not left as they are), or zero for a text in which it finds nothing.

    ``sparse`` says which kind of vectors it gives, and so which index searches them: ``csr_matrix`` or an array, both float32.
    ``one_process``: it keeps all cores, or the accelerator, busy by itself; several processes would be in each other's way.
    """

    name: ClassVar[str]
    sparse: ClassVar[bool]
    one_process: ClassVar[bool]

    @property
    def dim(self) -> int:
        """Columns of its vectors."""
        ...

    @classmethod
    def dim_of(cls, config: RetrievalConfig) -> int:
        """Columns of the vectors that these settings give."""
        ...

    @classmethod
    def facts(cls, config: RetrievalConfig) -> Mapping:
        """The settings that decide its vectors; the artefact's fingerprint covers them."""
        ...

    @classmethod
    def fit(cls, config: RetrievalConfig, texts: ChunkTexts, folder: Path) -> Mapping:
        """Learn from the training chunks alone, write the state to ``folder`` and return facts for the manifest."""
        ...

    @classmethod
    def load(cls, folder: Path, facts: Mapping) -> Self:
        """The embedder whose state and facts these are."""
        ...

    def embed(self, texts: list[str]) -> Vectors:
        """The vectors of texts to be found, float32 [texts, dim]. A text's vector depends on that text alone, not on the others
        in the list."""
        ...

    def embed_queries(self, texts: list[str]) -> Vectors:
        """The vectors of texts that search, chunks or questions: as :meth:`embed`, if need be by another model."""
        ...


EMBEDDERS: Mapping[str, type[Embedder]] = {"tfidf": TfidfEmbedder, "lsa": LsaEmbedder, "bert": BertEmbedder}


def build_embedder(config: RetrievalConfig, texts: ChunkTexts, path: Path) -> Artefact:
    """Fit the embedder that ``config`` names on the training chunks, or open it where it stands."""
    kind = EMBEDDERS[config.embedder]
    return build_artefact(
        path,
        kind="embedder",
        settings={"embedder": config.embedder, **kind.facts(config)},
        inputs=texts.inputs,
        make=lambda folder: kind.fit(config, texts, folder),
    )


def load_embedder(path: Path) -> Embedder:
    """The embedder whose artefact stands at ``path``."""
    artefact = open_artefact(path, "embedder")
    return EMBEDDERS[artefact.settings["embedder"]].load(artefact.path, artefact.settings)
