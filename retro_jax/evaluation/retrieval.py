"""How often the passage that answers a question is among the nearest ones: recall at 1, 5 and 20.

A passage is a document of the training split and ranks by its best chunk; k counts different passages, and the question alone is
what searches. A question counts as found at k if one of its gold passages is among the first k (the "top-k accuracy" of Karpukhin
et al. 2020, "Dense Passage Retrieval").
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from retro_jax.artefact import Artefact, build_artefact, write_text
from retro_jax.blocks import concatenate_blocks, run_blocks
from retro_jax.config import Config, EvalConfig
from retro_jax.corpus.digests import digest_file
from retro_jax.corpus.text_files import read_json_lines
from retro_jax.errors import UserError
from retro_jax.retrieval.database import Database

KS = (1, 5, 20)
LEVEL = 0.95
QUESTIONS_AT_ONCE = 256
VERSIONS = ("retro-jax", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True)
class Questions:
    """A file's questions, and for each the ids of the passages that answer it; ``name`` tells the file from others."""

    path: Path
    name: str
    texts: list[str]
    gold: list[list[str]]


def read_questions(paths: Sequence[str]) -> list[Questions]:
    """The files of ``EvalConfig.questions``.

    Raises:
        UserError: none is named, or one is not there, holds fewer than two questions or what is none; file and line are named.
    """
    if not paths:
        raise UserError(
            "EvalConfig.questions is empty; name a file of JSON lines with question and gold_passage_ids, for example "
            "--set EvalConfig.questions=nq.jsonl"
        )
    files = [Path(path) for path in paths]
    stems = [file.stem for file in files]
    names = [file.stem if stems.count(file.stem) == 1 else f"{file.resolve().parent.name}-{file.stem}" for file in files]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"EvalConfig.questions names two files {double!r}; give each another name")
    return [_read(file, name) for file, name in zip(files, names, strict=True)]


def evaluate_retrieval(config: Config, database: Database, sets: Sequence[Questions], folder: Path) -> list[dict]:
    """Search every question and count how often a gold passage is found.

    Writes ``retrieval-<file's name>.json`` into ``folder``, and the passages found into ``retrieval/``; what stands there for the
    same questions and the same database is not searched again, and a killed search goes on.

    Args:
        config: its ``evaluation``'s bootstrap_samples and seed are read.
        database: to be searched.
        sets: from :func:`read_questions`.
        folder: where results go.

    Returns:
        What the files hold: ``recall`` at each k as {"value", "low", "high"} (95%, percentiles over resampled questions), counts,
        and what was searched with.

    Raises:
        UserError: a question has no gold passage among the training documents.
    """
    results = []
    for questions in sets:
        gold = _gold_documents(questions, database)
        found_QS = _ranking(questions, database, folder).array("documents")
        hits_QS = np.array([np.isin(found_S, list(documents)) for found_S, documents in zip(found_QS, gold, strict=True)])
        result = _result(questions, database, hits_QS, config.evaluation)
        write_text(folder / f"retrieval-{questions.name}.json", json.dumps(result, indent=2) + "\n")
        results.append(result)
    return results


def recall(hits_QS: np.ndarray, *, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """The share of questions with a hit among the first k, for each k of ``KS``, with its interval.

    Args:
        hits_QS: bool [questions, passages], whether the passage at each rank is a gold one.
        samples: how many times questions are drawn with replacement.
        seed: of the draws.
    """
    figures = {}
    for k in KS:
        found_Q = hits_QS[:, :k].any(axis=1).astype(float)
        drawn = bootstrap(
            (found_Q,), np.mean, n_resamples=samples, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(seed)
        )
        low, high = drawn.confidence_interval
        figures[str(k)] = {"value": float(found_Q.mean()), "low": float(low), "high": float(high)}
    return figures


def print_recall(results: Sequence[Mapping], console: Console) -> None:
    """One row a file of questions."""
    first = results[0]
    facts = f"{first['embedder']['embedder']}, {first['passages']:,} passages in {first['chunks']:,} chunks"
    table = Table(
        title=f"Recall of gold passages: {facts} of {first['chunk_len']} tokens",
        caption="a passage ranks by its best chunk; k counts different passages; 95% intervals over resampled questions",
    )
    table.add_column("questions")
    table.add_column("count", justify="right")
    for k in KS:
        table.add_column(f"recall@{k}", justify="right")
    for result in results:
        cells = [f"{f['value']:.3f}\n{f['low']:.3f} to {f['high']:.3f}" for f in result["recall"].values()]
        table.add_row(result["questions"], f"{result['count']:,}", *cells)
    console.print(table)


def _read(path: Path, name: str) -> Questions:
    texts, gold = [], []
    try:
        lines = list(read_json_lines(path))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"EvalConfig.questions={str(path)!r} cannot be read ({reason}); check the path") from None
    for where, fields in lines:
        question, ids = (fields.get(name) if isinstance(fields, dict) else None for name in ("question", "gold_passage_ids"))
        if not isinstance(question, str) or not isinstance(ids, list) or not ids:
            raise UserError(f"{where} lacks a question (a text) or gold_passage_ids (a list of ids); mend it or leave it out")
        texts.append(question)
        gold.append([str(one) for one in ids])
    if len(texts) < 2:
        raise UserError(f"{path} holds {len(texts)} questions; give at least 2")
    return Questions(path, name, texts, gold)


def _gold_documents(questions: Questions, database: Database) -> list[set[int]]:
    found = database.names.find({one for ids in questions.gold for one in ids})
    gold = [{document for one in ids for document in found.get(one, [])} for ids in questions.gold]
    without = [number for number, documents in enumerate(gold) if not documents]
    if without:
        raise UserError(
            f"{len(without)} of the {len(gold)} questions of {questions.path} have no gold passage among the training documents, "
            f"as {questions.texts[without[0]]!r} with {', '.join(questions.gold[without[0]][:3])}; name a corpus that has them "
            "(its field id), with CorpusConfig.valid_fraction=0 and test_fraction=0"
        )
    return gold


def _ranking(questions: Questions, database: Database, folder: Path) -> Artefact:
    """The nearest passages of every question: ``documents.npy`` and ``chunks.npy`` int64 [questions, 20], and
    ``distances.npy``."""
    settings = {"questions": digest_file(questions.path), "passages": max(KS)}
    inputs = database.fingerprints
    key = hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode()).hexdigest()[:16]
    names = ("documents", "chunks", "distances")

    def search(start: int, stop: int) -> dict[str, np.ndarray]:
        return dict(zip(names, database.nearest_documents(questions.texts[start:stop], max(KS)), strict=True))

    def make(partial: Path) -> Mapping:
        count, size = len(questions.texts), QUESTIONS_AT_ONCE
        tasks = ((start, min(start + size, count)) for start in range(0, count, size))
        total = -(-count // size)
        blocks = run_blocks(partial, search, tasks, workers=1, description=f"questions of {questions.name}", total=total)
        for name in names:
            concatenate_blocks(partial, blocks, name, partial / f"{name}.npy")
        return {"questions": count}

    path = folder / "retrieval" / f"{questions.name}-{key}"
    return build_artefact(path, kind="ranking", settings=settings, inputs=inputs, make=make)


def _result(questions: Questions, database: Database, hits_QS: np.ndarray, config: EvalConfig) -> dict:
    embedder, index = database.artefacts["embedder"], database.artefacts["index"]
    return {
        "questions": questions.name,
        "sha256": digest_file(questions.path),
        "count": len(questions.texts),
        "recall": recall(hits_QS, samples=config.bootstrap_samples, seed=config.seed),
        "rank": "a passage (training document) ranks by its best chunk; k counts different passages; the question searches",
        "intervals": f"95%, percentiles over {config.bootstrap_samples} resamples of questions",
        "passages": database.table.num_documents,
        "chunks": database.table.num_chunks,
        "chunk_len": database.table.chunk_len,
        "embedder": {**embedder.settings, **embedder.summary},
        "index": {**index.settings, **index.summary},
        "data": database.fingerprints,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
    }
