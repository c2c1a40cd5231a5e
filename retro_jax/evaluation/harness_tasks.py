"""Tasks of lm-evaluation-harness from files on this machine: JSON lines in four shapes, or task files of its own.

| fields of a line | task | metrics |
|---|---|---|
| ``query``, ``choices``, ``gold`` | which choice goes on from the query (ARC, PIQA, COPA, CommonsenseQA) | acc, acc_norm |
| ``context_options``, ``continuation``, ``gold`` | after which context the continuation is likeliest (WinoGrande) | acc |
| ``context``, ``continuation`` | the continuation, word for word (LAMBADA) | perplexity, acc |
| ``text`` | a whole text | word_perplexity, byte_perplexity, bits_per_byte |

Prompts are those of lm_eval's own tasks: a blank stands before choice and continuation; a query that begins with "Question:" and
does not end with "Answer:" gets that on a line of its own. A field ``passages`` (a list of texts) is what a Retro reads with
``HarnessConfig.retrieval = "given"``.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_jax.corpus.text_files import read_json_lines
from retro_jax.errors import UserError

SPLIT = "test"
HIGHER = {"acc": True, "acc_norm": True, "perplexity": False, "word_perplexity": False, "byte_perplexity": False}
AGGREGATIONS = {"acc": "mean", "acc_norm": "mean", "word_perplexity": "weighted_perplexity"}
AGGREGATIONS |= {"perplexity": "perplexity", "byte_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Shape:
    """One kind of document: its fields with their types, and what lm_eval is told of them."""

    fields: Mapping[str, type]
    settings: Mapping[str, Any]
    metrics: tuple[str, ...]
    choices: str | None = None


SHAPES = (
    Shape(
        {"query": str, "choices": list, "gold": int},
        {"output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"},
        ("acc", "acc_norm"),
        choices="choices",
    ),
    Shape(
        {"context_options": list, "continuation": str, "gold": int},
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
        },
        ("acc",),
        choices="context_options",
    ),
    Shape(
        {"context": str, "continuation": str},
        {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"},
        ("perplexity", "acc"),
    ),
    Shape(
        {"text": str},
        {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"},
        ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    ),
)


def refuse_without_lm_eval() -> None:
    """Raise a UserError where lm_eval is not installed."""
    missing = [name for name in ("lm_eval", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"lm-evaluation-harness is not installed ({missing[0]} is missing); install it with pip install 'retro-jax[harness]'"
        )


def load_tasks(names: Sequence[str], *, fewshot: int | None, seed: int) -> Mapping[str, Any]:
    """What lm_eval evaluates: its ``TaskManager.load`` of the tasks of ``HarnessConfig.tasks``.

    Args:
        names: files or folders of JSON lines, task files, or names of lm_eval's tasks.
        fewshot: examples before each question; None: as each task says, and none of local files.
        seed: draws them.

    Raises:
        UserError: none is named, one is not there, or a line is none of the shapes; file and line are named.
    """
    if not names:
        raise UserError(
            "HarnessConfig.tasks is empty; name folders of JSON lines, lm_eval's task files or names of its tasks, for example "
            "--set HarnessConfig.tasks=data/mc_arc_easy"
        )
    with _quiet():
        tasks = [_local_task(Path(name)) if _is_local(name) else name for name in names]
        of_lm_eval = [task for task in tasks if isinstance(task, str)]
        loaded = _load(tasks, with_its_own=any(not task.endswith(SUFFIXES) for task in of_lm_eval))
        for task in loaded["tasks"].values():
            if fewshot is not None:
                task.set_config("num_fewshot", fewshot)
            task.set_fewshot_seed(seed)
    return loaded


def _is_local(name: str) -> bool:
    return Path(name).exists() and not name.endswith(SUFFIXES)


def _load(tasks: list[Any], *, with_its_own: bool) -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    files = [task for task in tasks if isinstance(task, str) and task.endswith(SUFFIXES)]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise UserError(f"HarnessConfig.tasks names {missing[0]!r}, which is not there; check the path")
    manager = TaskManager(include_defaults=with_its_own)
    its_own = {task for task in tasks if isinstance(task, str)} - set(files)
    for name in sorted(its_own):
        if name not in manager.all_tasks:
            raise UserError(
                f"HarnessConfig.tasks names {name!r}, which is neither a file nor a folder, nor a task of lm_eval; check the "
                "path, or look for the name in `lm_eval ls tasks`"
            )
    names = [task if isinstance(task, str) else task.task_name for task in tasks]
    try:
        return manager.load(tasks)
    except UserError:
        raise
    except Exception as error:  # of many kinds: the file's syntax, a data set that cannot be had, a field that is not there
        raise UserError(
            f"lm_eval cannot load the tasks {', '.join(names)} ({_first_line(error)}); mend the task's file, or leave it out"
        ) from error


def _local_task(path: Path) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    file = _file_of(path)
    shape, documents = read_documents(file)
    name = path.stem if path.is_file() else path.resolve().name
    metrics = [
        {"metric": metric, "aggregation": AGGREGATIONS[metric], "higher_is_better": HIGHER.get(metric, False)}
        for metric in shape.metrics
    ]
    data: Callable[..., Any] = lambda **_: {SPLIT: datasets.Dataset.from_list(documents)}  # noqa: E731
    settings = {"task": name, "custom_dataset": data, "test_split": SPLIT, "fewshot_split": SPLIT, "num_fewshot": 0}
    return ConfigurableTask(config={**settings, **shape.settings, "metric_list": metrics, "metadata": {"version": 1.0}})


def read_documents(file: Path) -> tuple[Shape, list[dict[str, Any]]]:
    """The lines of a file, with lm_eval's prompts, and their common shape.

    Raises:
        UserError: the file cannot be read, or a line is not JSON, of no shape or of another than the first, or its ``gold``
            names no choice.
    """
    shape, documents = None, []
    try:
        for where, fields in read_json_lines(file):
            keys = fields.keys() if isinstance(fields, dict) else set()
            shape = shape or next((one for one in SHAPES if one.fields.keys() <= keys), None)
            documents.append(_document(fields, shape, where))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); check the path") from None
    if shape is None:
        raise UserError(f"{file} holds no document; give at least one line")
    return shape, documents


def _document(fields: Any, shape: Shape | None, where: str) -> dict[str, Any]:
    known = "; ".join(", ".join(one.fields) for one in SHAPES)
    if shape is None:
        raise UserError(f"{where} has not the fields of any task that is made of JSON lines ({known}); mend it")
    for name, kind in shape.fields.items():
        if not isinstance(fields, dict) or not isinstance(fields.get(name), kind) or isinstance(fields.get(name), bool):
            raise UserError(
                f"{where} lacks the field {name} ({kind.__name__}) that the lines before have; mend it or leave it out"
            )
    passages = fields.get("passages", [])
    if not isinstance(passages, list) or not all(isinstance(text, str) for text in passages):
        raise UserError(f"{where} has a field passages that is no list of texts; mend it or leave it out")
    document = {name: fields[name] for name in shape.fields} | ({"passages": passages} if "passages" in fields else {})
    if shape.choices is not None:
        choices = document[shape.choices]
        if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
            raise UserError(f"{where} has {shape.choices} that are not two or more texts; mend it or leave it out")
        if not 0 <= document["gold"] < len(choices):
            raise UserError(f"{where} has gold={document['gold']}, but choices 0 to {len(choices) - 1}; mend it or leave it out")
    if "query" in document:
        document["query"] = _asked(document["query"])
    if "context" in document:  # lm_eval puts a blank before choices, and none before this
        document["continuation"] = f" {document['continuation'].lstrip(' ')}"
    return document


def _asked(query: str) -> str:
    """The query as lm_eval's own tasks put it."""
    query = query.strip()
    return f"{query}\nAnswer:" if query.startswith("Question:") and not query.endswith("Answer:") else query


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.jsonl"))
    if len(files) != 1:
        raise UserError(
            f"HarnessConfig.tasks names the folder {str(path)!r}, which has {len(files)} files *.jsonl; name one with one, or "
            "the file itself"
        )
    return files[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval tells at length what it loads; here only errors are heard."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
