"""Trained models on tasks of lm-evaluation-harness: every model and mode, resumable, with one result for all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console

from retro_jax.artefact import write_text
from retro_jax.config import Config, RetrievalMode
from retro_jax.corpus.digests import digest_file
from retro_jax.data.reader import neighbour_filter
from retro_jax.evaluation.harness_answers import Answers
from retro_jax.evaluation.harness_models import Opened, language_model, longest_row, open_models, reads_neighbours
from retro_jax.evaluation.harness_report import figures, print_harness
from retro_jax.evaluation.harness_tasks import load_tasks
from retro_jax.evaluation.perplexity import parameters_digest
from retro_jax.model import Retro
from retro_jax.training.checkpoint import LATEST
from retro_jax.training.step import compute_dtype

if TYPE_CHECKING:
    from retro_jax.evaluation.harness import RetroLM

VERSIONS = ("retro-jax", "lm-eval", "jax", "flax", "numpy", "tokenizers")


def evaluate_run(config: Config, data_dir: Path, workdir: Path, console: Console, which: str | int = LATEST) -> dict:
    """Evaluate the models of a workdir by ``config.harness``, print the table and write ``<workdir>/evaluation/harness.json``.

    What is answered is kept in ``<workdir>/evaluation/harness/``, a file a model and mode; the same command goes on from it.

    Args:
        config: names the models and says how to evaluate.
        data_dir: the run's data artefacts; database and index are built where they are missing.
        workdir: holds ``models/``.
        console: takes the table.
        which: checkpoints "latest", "best", or a step.

    Returns:
        What the JSON file holds: for each task and metric the value of each model and mode with its standard error.

    Raises:
        UserError: a task is not there, or the main model is not trained.
    """
    load_tasks(config.harness.tasks, fewshot=config.harness.fewshot, seed=config.harness.seed)  # before anything is built
    opened = open_models(config, workdir, data_dir, which, live="live" in config.harness.retrieval, build=True)
    result = evaluate_harness(opened, workdir / "evaluation")
    print_harness(result, console)
    return result


def evaluate_harness(opened: Opened, folder: Path) -> dict:
    """See :func:`evaluate_run`; ``folder`` takes the results."""
    config, passes = opened.config.harness, {}
    for name, (model, step) in opened.models.items():
        digest = parameters_digest(model)
        for row, mode in _rows(name, model, config.retrieval):
            key = _key(opened, digest, mode)
            answers = Answers(folder / "harness" / f"{row.replace(' ', '-')}-{key[:16]}.jsonl", key)
            tasks = load_tasks(config.tasks, fewshot=config.fewshot, seed=config.seed)
            found = _evaluated(language_model(opened, name, mode, answers, row), tasks, opened.config)
            passes[row] = (found, {"parameters": digest, "step": step, "retrieval": mode})
    result = {
        "tasks": figures({row: found for row, (found, _) in passes.items()}),
        "models": {row: facts for row, (_, facts) in passes.items()},
        "intervals": "95%: 1.96 standard errors, as lm_eval estimates them, to either side",
        "settings": dataclasses.asdict(config),
        "files": {name: digest_file(file) for name in config.tasks for file in _files(Path(name))},
        "max_tokens": longest_row(opened.config),
        "data": {} if opened.database is None else dict(opened.database.fingerprints),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "device": jax.devices()[0].device_kind,
    }
    text = json.dumps(result, indent=2) + "\n"
    write_text(folder / "harness.json", text)
    return json.loads(text)


def _rows(name: str, model: Retro, modes: Sequence[RetrievalMode]) -> Iterator[tuple[str, RetrievalMode]]:
    """What is evaluated of a model, and the name of its row in the result: "gpt", "retro live", "retro none"."""
    if reads_neighbours(model):
        yield from ((f"{name} {mode}", mode) for mode in modes)
    else:
        yield name, "none"


def _key(opened: Opened, digest: str, mode: RetrievalMode) -> str:
    """A fingerprint of all that answers depend on beside their questions."""
    config = opened.config
    reads = {
        "model": digest,
        "retrieval": mode,
        "database": None if mode != "live" or opened.database is None else dict(opened.database.fingerprints),
        "filter": dataclasses.asdict(neighbour_filter(config)) if mode == "live" else None,
        "chunks": None if mode == "none" else dataclasses.asdict(config.chunks),
        "max_tokens": longest_row(config),
        "batch_size": config.harness.batch_size,
        "dtype": str(compute_dtype(config.training)),
    }
    return hashlib.sha256(json.dumps(reads, sort_keys=True).encode()).hexdigest()


def _evaluated(model: RetroLM, tasks: Mapping[str, Any], config: Config) -> Mapping[str, Any]:
    """What lm_eval says of a model."""
    from lm_eval.evaluator import evaluate

    with _in_one_process(), contextlib.redirect_stdout(sys.stderr):
        found = evaluate(
            model,
            tasks,
            limit=config.harness.limit,
            bootstrap_iters=config.harness.bootstrap_samples,
            log_samples=False,
        )
    assert found is not None
    return found


@contextlib.contextmanager
def _in_one_process() -> Iterator[None]:
    """lm_eval draws its bootstrap samples in forked processes; a fork of a program with JAX's threads may hang."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.jsonl"))
