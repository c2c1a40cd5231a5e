"""The trained models of a run, opened as what lm_eval asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_jax.config import Config, GenerateConfig, RetrievalMode
from retro_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from retro_jax.data.reader import neighbour_filter
from retro_jax.errors import UserError
from retro_jax.evaluation.harness import RetroLM
from retro_jax.evaluation.likelihood import Kept, Scorer
from retro_jax.evaluation.remembered import RememberingRetriever
from retro_jax.generation.engine import Engine
from retro_jax.generation.neighbours import DatabaseRetriever, Retriever
from retro_jax.generation.prompt import Completion, Prompt
from retro_jax.gin_config import load_config
from retro_jax.model import Retro
from retro_jax.prepare import prepare_database
from retro_jax.retrieval.database import Database
from retro_jax.training.checkpoint import LATEST
from retro_jax.training.step import compute_dtype
from retro_jax.training.trained import load_trained


@dataclass(frozen=True)
class Opened:
    """A run as it is evaluated: ``models`` by name with their checkpoints' steps; ``database`` where some model reads it."""

    config: Config
    tokenizer: Tokenizer
    models: dict[str, tuple[Retro, int]]
    database: Database | None


def open_run(
    workdir: str,
    model: str | None = None,
    checkpoint: str = LATEST,
    retrieval: RetrievalMode = "live",
    batch_size: int | None = None,
    max_tokens: int | None = None,
) -> RetroLM:
    """A trained model of a run as lm_eval takes it, with the config that stands in the workdir.

    Args:
        workdir: of the run.
        model: its name, "retro" or "gpt"; None: the main model.
        checkpoint: "latest", "best", or a step.
        retrieval: what a model with retrieval reads.
        batch_size, max_tokens: as in ``HarnessConfig``, in place of the config's.

    Raises:
        UserError: the run or the model is not there.
    """
    folder, stored = Path(workdir), Path(workdir) / "config.gin"
    if not stored.is_file():
        raise UserError(f"{stored} is not there; name the folder of a trained run, for example workdir=runs/quickstart")
    config = load_config([stored])
    given = config.harness
    harness = dataclasses.replace(given, batch_size=batch_size or given.batch_size, max_tokens=max_tokens or given.max_tokens)
    config = dataclasses.replace(config, harness=harness)
    data_dir = Path(config.data_dir) if config.data_dir else folder / "data"
    opened = open_models(config, folder, data_dir, checkpoint, live=retrieval == "live", build=False)
    name = next(iter(opened.models)) if model is None else model
    if name not in opened.models:
        raise UserError(f"{folder} has no trained model {name!r}; choose one of {', '.join(opened.models)}")
    mode: RetrievalMode = retrieval if reads_neighbours(opened.models[name][0]) else "none"
    return language_model(opened, name, mode, row=name)


def open_models(config: Config, workdir: Path, data_dir: Path, which: str | int, *, live: bool, build: bool) -> Opened:
    """The models of a workdir.

    Args:
        config: names them.
        workdir: holds ``models/``.
        data_dir: holds the tokenizer, and the database.
        which: checkpoints "latest", "best", or a step.
        live: open the database, where the main model reads it.
        build: build it where it is missing; False: raise.

    Raises:
        UserError: something is missing, or a model was trained with another tokenizer.
    """
    reads = live and config.model.retro is not None and config.model.retro.gate != 0.0
    if not reads:
        database = None
    elif build:
        database = prepare_database(config, data_dir)
    else:
        database = Database(data_dir)
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    models = load_trained(config, tokenizer.vocab_size, workdir, which)
    for name, (model, _) in models.items():
        refuse_other_vocabulary(name, model, tokenizer)
    return Opened(config, tokenizer, models, database)


def language_model(opened: Opened, name: str, mode: RetrievalMode, kept: Kept | None = None, row: str = "") -> RetroLM:
    """One of the models as lm_eval takes it; ``row`` names it in progress bars, ``kept`` holds what it answered before."""
    config, model = opened.config, opened.models[name][0]
    retriever = _retriever(opened) if mode == "live" else None
    size = config.harness.batch_size
    scorer = Scorer(model, config.training, longest=longest_row(config), batch_size=size, retriever=retriever)
    return RetroLM(
        scorer,
        opened.tokenizer,
        retrieval=mode,
        complete=_completes(opened, model, retriever),
        batch_size=size,
        max_new_tokens=config.harness.max_new_tokens,
        kept=kept,
        name=row,
    )


def _retriever(opened: Opened) -> Retriever:
    config, database = opened.config, opened.database
    assert database is not None
    keep, saved = neighbour_filter(config), config.retrieval.saved
    return RememberingRetriever(DatabaseRetriever(database, opened.tokenizer, config.chunks, keep, saved))


def _completes(
    opened: Opened, model: Retro, retriever: Retriever | None
) -> Callable[[Sequence[Prompt], GenerateConfig], list[Completion]]:
    """What completes prompts; its engine, with a copy of the parameters, is made when the first are asked."""
    engines: list[Engine] = []

    def complete(prompts: Sequence[Prompt], config: GenerateConfig) -> list[Completion]:
        if not engines:
            dtype = compute_dtype(opened.config.training)
            engines.append(Engine(model, opened.tokenizer, opened.config.generation, retriever, dtype=dtype))
        return engines[0].complete(prompts, config)

    return complete


def refuse_other_vocabulary(name: str, model: Retro, tokenizer: Tokenizer) -> None:
    """Raise a UserError where the tokenizer has ids that the model does not know."""
    size = model.config.vocab_size
    if size is None or size < tokenizer.vocab_size:
        raise UserError(
            f"the model {name} knows {size} tokens, and the tokenizer has {tokenizer.vocab_size}: it was trained with another "
            "one; name the data that it was trained on with Config.data_dir"
        )


def longest_row(config: Config) -> int:
    """Tokens of a row at most."""
    return config.harness.max_tokens or config.data.seq_len


def reads_neighbours(model: Retro) -> bool:
    """Whether there is anything to retrieve for."""
    return model.config.retro is not None and model.config.retro.gate != 0.0
