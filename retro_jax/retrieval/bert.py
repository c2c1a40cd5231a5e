"""Sentence encoders of BERT's form as an embedder: which folders, and which of two models embeds what."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from retro_jax.config import RetrievalConfig
from retro_jax.errors import BadInput, UserError
from retro_jax.retrieval.bert_folder import CONFIG, QUERY, TOKENIZER, encoder_facts, query_facts, same_model, weight_files
from retro_jax.retrieval.bert_tower import BertTower
from retro_jax.retrieval.chunk_texts import ChunkTexts

# Where the artefact keeps the model of queries, if it is another.
QUERY_FOLDER = "query"


class BertEmbedder:
    """An encoder, or two of one width: one for the database, one for what searches in it."""

    name: ClassVar[str] = "bert"
    sparse: ClassVar[bool] = False
    one_process: ClassVar[bool] = True

    def __init__(self, folder: Path, query_folder: Path, facts: Mapping) -> None:
        self._facts = facts
        self.passages = BertTower(folder, facts)
        theirs = query_facts(facts)
        if theirs is None:
            self.queries = self.passages
        else:
            self.queries = BertTower(query_folder, theirs, self.passages if same_model(facts, theirs) else None)

    @property
    def dim(self) -> int:
        """The encoder's width."""
        return self._facts["dim"]

    @classmethod
    def dim_of(cls, config: RetrievalConfig) -> int:
        """The encoder's width."""
        return cls.facts(config)["dim"]

    @classmethod
    def facts(cls, config: RetrievalConfig) -> Mapping:
        """See :func:`retro_jax.retrieval.bert_folder.encoder_facts`."""
        return encoder_facts(config.bert)

    @classmethod
    def fit(cls, config: RetrievalConfig, texts: ChunkTexts, folder: Path) -> Mapping:
        """Nothing is learned: the models' files are checked and copied, so that the artefact is whole by itself.

        Raises:
            UserError: the weights are not those of the encoder that ``config.json`` tells, or the tokenizer's ids are not; or
                vectors of any length are to be compared by their cosine.
        """
        assert config.bert.path is not None
        source, query_source = Path(config.bert.path), Path(config.bert.query_path or config.bert.path)
        facts = cls.facts(config)
        theirs = query_facts(facts)
        if config.metric == "cosine" and "no" in (facts["normalize"], (theirs or facts)["normalize"]):
            raise BadInput(
                f"{source} gives vectors of any length, and RetrievalConfig.metric='cosine' takes those of unit length; "
                "use metric='inner_product', or BertConfig.normalize='yes'"
            )
        told: dict[str, str | int] = {"name": source.resolve().name, "pooling": facts["pooling"], "dim": facts["dim"]}
        try:
            model = cls(source, query_source, facts)
            told["parameters"] = model.passages.parameters
            _copy(source, folder)
            if theirs is not None:
                query_told = {"name": query_source.resolve().name, "pooling": theirs["pooling"]}
                told |= {f"{QUERY}{name}": value for name, value in query_told.items()}
                told[f"{QUERY}parameters"] = model.queries.parameters
                if not same_model(facts, theirs):
                    _copy(query_source, folder / QUERY_FOLDER)
        except UserError as error:
            raise BadInput(str(error)) from None
        return told

    @classmethod
    def load(cls, folder: Path, facts: Mapping) -> Self:
        """From the files that :meth:`fit` copied; the weights are read when the first text is embedded."""
        query_folder = folder / QUERY_FOLDER
        return cls(folder, query_folder if query_folder.is_dir() else folder, facts)

    def embed(self, texts: list[str]) -> np.ndarray:
        """See :meth:`retro_jax.retrieval.bert_tower.BertTower.embed`."""
        return self.passages.embed(texts)

    def embed_queries(self, texts: list[str]) -> np.ndarray:
        """As :meth:`embed`, by the model of queries."""
        return self.queries.embed(texts)

    def token_ids(self, texts: list[str]) -> list[np.ndarray]:
        """What the database's model reads of each text, int32."""
        return self.passages.token_ids(texts)


def _copy(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in (source / CONFIG, source / TOKENIZER, *weight_files(source)):
        shutil.copyfile(file, folder / file.name)
