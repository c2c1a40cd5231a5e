"""Question answering: every file of questions, model and mode; figures with intervals."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from retro_jax.artefact import write_text
from retro_jax.config import QaConfig, QaMode
from retro_jax.corpus.digests import digest_file
from retro_jax.errors import UserError
from retro_jax.evaluation.answers import ROUGES, chosen, exact_match, f1, f1_first, rouge, without_label
from retro_jax.evaluation.intervals import Means, means_with_intervals
from retro_jax.evaluation.outputs import Answerer, completed
from retro_jax.evaluation.prompts import Asker
from retro_jax.evaluation.questions import Passage, PassageIds, Question, read_questions
from retro_jax.generation.prompt import Completion

VERSIONS = ("retro-jax", "jax", "numpy", "rouge-score")
SHOWN = {"exact_match": "EM", "f1": "F1", "rouge": "ROUGE", "accuracy": "accuracy"}


class Evidence(Protocol):
    """What finds passages for questions."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of what it searches."""
        ...

    def find(self, texts: Sequence[str], wanted: int) -> list[tuple[Passage, ...]]:
        """The nearest passages of each text, nearest first."""
        ...


@dataclass(frozen=True, kw_only=True)
class Answering:
    """A model to ask. ``answerer`` by mode; "retro" and "retro++" are missing where it has no encoder to read passages.
    ``fingerprint`` tells its parameters and all else that decides its answers."""

    answerers: Mapping[QaMode, Answerer]
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Examination:
    """A file of questions with the passages that are asked with."""

    name: str
    path: Path
    questions: list[Question]
    passages: list[tuple[Passage, ...]]


def read_examinations(config: QaConfig, evidence: Evidence | None) -> list[Examination]:
    """The files of ``QaConfig.questions``, with passages as ``QaConfig.evidence`` says.

    Args:
        config: the settings.
        evidence: finds passages, where they are not given.

    Raises:
        UserError: no file is named, one cannot be read or is not of questions with answers, or passages are asked for that no
            question of a file has.
    """
    if not config.questions:
        raise UserError(
            "QaConfig.questions is empty; name a file of JSON lines with question and answers, for example "
            "--set QaConfig.questions=nq.jsonl"
        )
    ids, found = PassageIds.read(config.passages), []
    for name, path in _names(config.questions).items():
        questions = read_questions(path, ids)[: config.max_questions]
        if config.modes == ("closed",):
            passages: list[tuple[Passage, ...]] = [()] * len(questions)
        elif config.evidence == "given":
            passages = [question.passages[: config.num_passages] for question in questions]
            if not any(passages):
                raise UserError(
                    f"{path} gives no passages, which the modes {', '.join(m for m in config.modes if m != 'closed')} need; set "
                    "QaConfig.evidence='retrieved', name the file of its passage_ids with QaConfig.passages, or leave them out"
                )
        else:
            assert evidence is not None
            passages = evidence.find([question.text for question in questions], config.num_passages)
        found.append(Examination(name=name, path=Path(path), questions=questions, passages=passages))
    return found


def evaluate_qa(
    config: QaConfig, sets: Sequence[Examination], models: Mapping[str, Answering], asker: Asker, folder: Path, facts: Mapping
) -> list[dict]:
    """Ask every model every question in every mode that it has, and say how right the answers are.

    Writes ``qa-<file's name>.json`` into ``folder`` and the answers into ``qa/``, where a run that was killed goes on.

    Args:
        config: the settings.
        sets: from :func:`read_examinations`.
        models: by name.
        asker: makes the prompts.
        folder: where results go.
        facts: what else is written down: steps, fingerprints of data.

    Returns:
        What the files hold. ``figures`` by "model mode": each {"value", "low", "high"} (95%, percentiles over resampled
        questions) of exact_match, f1, f1_first, rouge1, rouge2, rougeL and rouge, their geometric mean; where questions have
        choices, of accuracy alone.
    """
    results = []
    for examination in sets:
        rows = {}
        for model, answering in models.items():
            for mode in config.modes:
                if mode in answering.answerers:
                    answers = _answers(config, examination, f"{model} {mode}", mode, answering, asker, folder / "qa")
                    rows[f"{model} {mode}"] = _figures(config, examination.questions, answers)
        result = _result(config, examination, rows, facts)
        write_text(folder / f"qa-{examination.name}.json", json.dumps(result, indent=2) + "\n")
        results.append(result)
    return results


def print_answers(results: Sequence[Mapping], console: Console) -> None:
    """A table a file of questions, a row a model and mode."""
    for result in results:
        figures = next(iter(result["figures"].values()))
        shown = [name for name in SHOWN if name in figures]
        table = Table(
            title=f"{result['questions']}: {result['count']:,} questions, template {result['settings']['template']}",
            caption="in percent; 95% intervals over resampled questions",
        )
        table.add_column("model and mode")
        for name in shown:
            table.add_column(SHOWN[name], justify="right")
        for row, figures in result["figures"].items():
            values = (figures[name] for name in shown)
            table.add_row(row, *(f"{100 * f['value']:.1f}\n{100 * f['low']:.1f} to {100 * f['high']:.1f}" for f in values))
        console.print(table)


def _names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each file, by its own or with its folder's; they must differ, as results are named so."""
    stems = [Path(path).name.split(".")[0] for path in paths]
    names = [
        stem if stem != "items" and stems.count(stem) == 1 else f"{Path(path).resolve().parent.name}-{stem}"
        for path, stem in zip(paths, stems, strict=True)
    ]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"QaConfig.questions names two files {double!r}; give each another name")
    return dict(zip(names, paths, strict=True))


def _answers(
    config: QaConfig, examination: Examination, row: str, mode: QaMode, answering: Answering, asker: Asker, folder: Path
) -> list[Completion]:
    prompts = [
        asker.prompt(question, passages, mode, seed=config.seed)
        for question, passages in zip(examination.questions, examination.passages, strict=True)
    ]
    settings = {"model": answering.fingerprint, "max_new_tokens": config.max_new_tokens, "stop": list(asker.template.stop)}
    name = f"{examination.name}-{row.replace(' ', '-').replace('+', 'p')}"
    return completed(folder, name, settings, prompts, answering.answerers[mode])


def _figures(config: QaConfig, questions: Sequence[Question], answers: Sequence[Completion]) -> dict:
    texts = [without_label(answer.text) for answer in answers]
    if all(question.choices for question in questions):
        right = [chosen(text, q.choices) == _gold(q) for text, q in zip(texts, questions, strict=True)]
        return means_with_intervals(
            {"accuracy": np.array(right, float), "undecided": _undecided(texts, questions)},
            samples=config.bootstrap_samples,
            seed=config.seed,
        )
    pairs = [(text, question.answers) for text, question in zip(texts, questions, strict=True)]
    rouges_IR = np.array([rouge(*pair) for pair in pairs])
    return means_with_intervals(
        {
            "exact_match": np.array([exact_match(*pair) for pair in pairs]),
            "f1": np.array([f1(*pair) for pair in pairs]),
            "f1_first": np.array([f1_first(*pair) for pair in pairs]),
            **dict(zip(ROUGES, rouges_IR.T, strict=True)),
        },
        samples=config.bootstrap_samples,
        seed=config.seed,
        combined=_geometric,
    )


def _geometric(means: Means) -> Means:
    return {"rouge": np.cbrt(np.prod([means[name] for name in ROUGES], axis=0))}


def _gold(question: Question) -> int:
    return question.choices.index(question.answers[0])


def _undecided(texts: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    return np.array([chosen(text, q.choices) is None for text, q in zip(texts, questions, strict=True)], float)


def _result(config: QaConfig, examination: Examination, rows: Mapping, facts: Mapping) -> dict:
    settings = {name: value for name, value in vars(config).items() if name != "questions"}
    return {
        "questions": examination.name,
        "sha256": digest_file(examination.path),
        "count": len(examination.questions),
        "with_passages": sum(map(bool, examination.passages)),
        "figures": rows,
        "intervals": f"95%, percentiles over {config.bootstrap_samples} resamples of questions",
        "settings": settings,
        **facts,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
    }
