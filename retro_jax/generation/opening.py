"""A run's model, tokenizer and database, opened together as an engine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from retro_jax.artefact import open_artefact
from retro_jax.config import Config, GenerateConfig
from retro_jax.corpus.tokenizer import load_tokenizer
from retro_jax.data.reader import neighbour_filter
from retro_jax.errors import UserError
from retro_jax.generation.engine import Engine
from retro_jax.generation.neighbours import DatabaseRetriever
from retro_jax.retrieval.database import Database
from retro_jax.training.checkpoint import LATEST, load_model, opened_checkpoint
from retro_jax.training.step import compute_dtype
from retro_jax.training.train import MODELS
from retro_jax.training.twins import model_name

# What changes how fast completions come, and not what they are.
FASTER = ("batch_size", "in_flight", "burst")


@dataclass(frozen=True)
class Opened:
    """An engine, the database that it searches (None: it searches none) and its folder, and what else decides what it answers:
    the model's name, step and digests, and fingerprints of the data."""

    engine: Engine
    database: Database | None
    data_dir: Path
    facts: dict

    def digest(self, config: GenerateConfig) -> str:
        """A fingerprint of all that decides what the engine answers to a prompt."""
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FASTER}
        return hashlib.sha256(json.dumps({**self.facts, "settings": settings}, sort_keys=True).encode()).hexdigest()[:16]


def open_engine(
    config: Config,
    data_dir: Path,
    workdir: Path,
    *,
    model: str | None = None,
    checkpoint: str | int = LATEST,
    database: Path | None = None,
) -> Opened:
    """The engine of a trained model.

    Args:
        config: the run's settings; ``generation`` is the engine's.
        data_dir: the run's data.
        workdir: holds ``models/``.
        model: which of them; None: the main one.
        checkpoint: "latest", "best", or a step.
        database: data to search in place of the run's, cut and encoded by the same tokenizer.

    Raises:
        UserError: the model is not trained, the data are missing, or the tokenizer or the grid is not the one that the model was
            trained with.
    """
    name = model or model_name(config.model)
    folder = workdir / MODELS / name
    if model is not None and not folder.is_dir() and (workdir / MODELS).is_dir():
        there = ", ".join(sorted(path.name for path in (workdir / MODELS).iterdir() if path.is_dir()))
        raise UserError(f"{workdir} has no model {model!r}; it has {there or 'none'}")
    with opened_checkpoint(folder, checkpoint) as (checkpoints, step, _):
        about = checkpoints.about(step)
    tokenizer_fingerprint = open_artefact(data_dir / "tokenizer", "tokenizer").fingerprint
    if about.data.get("tokenizer", tokenizer_fingerprint) != tokenizer_fingerprint:
        raise UserError(
            f"{folder} was trained with another tokenizer than {data_dir / 'tokenizer'}; give the --config or Config.data_dir "
            "that it was trained with"
        )
    trained, _ = load_model(folder, step)
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    facts = {"model": name, "step": step, "parameters": about.digests, "tokenizer": tokenizer_fingerprint}
    opened, retriever, searched = None, None, database or data_dir
    retro = trained.config.retro
    if retro is not None and retro.gate != 0.0 and config.generation.retrieval == "live":
        opened = Database(searched)
        _refuse_other_database(opened, searched, tokenizer_fingerprint, retro.chunks.chunk_len)
        keep = neighbour_filter(config)
        retriever = DatabaseRetriever(opened, tokenizer, retro.chunks, keep, config.retrieval.saved)
        facts |= {"database": opened.fingerprints, "keep": dataclasses.asdict(keep)}
    engine = Engine(trained, tokenizer, config.generation, retriever, dtype=compute_dtype(config.training))
    return Opened(engine, opened, searched, facts)


def _refuse_other_database(database: Database, folder: Path, tokenizer_fingerprint: str, chunk_len: int) -> None:
    if database.texts.tokenizer_fingerprint != tokenizer_fingerprint:
        raise UserError(
            f"{folder} was built with another tokenizer than the model's; build it with that one (TokenizerConfig.path), or "
            "search the run's own data"
        )
    if database.table.chunk_len != chunk_len:
        raise UserError(
            f"{folder} has chunks of {database.table.chunk_len} tokens, the model reads those of {chunk_len}; build it with "
            f"ChunkConfig.chunk_len={chunk_len}"
        )
