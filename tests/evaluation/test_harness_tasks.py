"""Documents and answers as files, without lm_eval: the shapes, the prompts, what is refused, and what a kill leaves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from retro_jax.config import HarnessConfig
from retro_jax.errors import UserError
from retro_jax.evaluation.harness_answers import Answers
from retro_jax.evaluation.harness_tasks import load_tasks, read_documents, refuse_without_lm_eval

CHOICE = {"query": "The sky is", "choices": ["blue.", "green."], "gold": 0}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("The woman retired, therefore", "The woman retired, therefore"),
        ("Question: dresser\n", "Question: dresser\nAnswer:"),
        ("Question: Which?", "Question: Which?\nAnswer:"),
        ("Question: Where?\nChoices:\nA. here\nAnswer:", "Question: Where?\nChoices:\nA. here\nAnswer:"),
    ],
)
def test_prompts_are_those_of_lm_eval(tmp_path: Path, query: str, asked: str) -> None:
    shape, (document,) = read_documents(write(tmp_path, CHOICE | {"query": query}))
    assert document["query"] == asked and shape.metrics == ("acc", "acc_norm")


def test_a_blank_stands_before_a_continuation_and_passages_stay(tmp_path: Path) -> None:
    rows = ({"context": "He said", "continuation": "no", "passages": ["He said no."], "id": 3}, "")
    shape, documents = read_documents(write(tmp_path, *rows))
    assert documents == [{"context": "He said", "continuation": " no", "passages": ["He said no."]}]
    assert shape.metrics == ("perplexity", "acc")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "why"}], "line 1 has not the fields of any task .*query, choices, gold; context_options"),
        ([CHOICE, {"context": "a", "continuation": "b"}], r"line 2 lacks the field query \(str\) that the lines before have"),
        ([CHOICE | {"gold": 2}], "line 1 has gold=2, but choices 0 to 1"),
        ([CHOICE | {"gold": True}], r"line 1 lacks the field gold \(int\)"),
        ([CHOICE | {"choices": ["one"]}], "line 1 has choices that are not two or more texts"),
        ([CHOICE | {"passages": "text"}], "line 1 has a field passages that is no list of texts"),
        ([CHOICE, "{"], "line 2 is not JSON"),
        ([], "holds no document"),
    ],
)
def test_bad_documents(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_documents(write(tmp_path, *rows))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"items.jsonl.* UTF-8"):
        read_documents(tmp_path / "items.jsonl")
    with pytest.raises(UserError, match=r"none.jsonl cannot be read \(No such file or directory\); check the path"):
        read_documents(tmp_path / "none.jsonl")


def test_a_line_may_hold_a_line_separator(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    assert read_documents(tmp_path / "items.jsonl")[1] == [{"text": "one\u2028two"}]


def test_no_task_and_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="HarnessConfig.tasks is empty; name folders"):
        load_tasks((), fewshot=None, seed=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm-evaluation-harness is not installed .* pip install 'retro-jax\[harness\]'"):
        refuse_without_lm_eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retrieval": ()}, "must name one or more of live, given, none"),
        ({"retrieval": ("live", "on")}, "must name one or more of live, given, none"),
        ({"retrieval": ("live", "live")}, "names something twice"),
        ({"tasks": ("a", "a")}, "names something twice"),
        ({"batch_size": 0}, "HarnessConfig.batch_size=0 must be positive"),
        ({"limit": 0}, "HarnessConfig.limit=0 must be positive"),
        ({"fewshot": -1}, "HarnessConfig.fewshot=-1 must not be negative"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HarnessConfig(**settings)


def test_answers_stay_whatever_stops_the_program(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "retro.jsonl"
    answers = Answers(path, "key")
    assert answers.get("a") is None and not path.exists()
    answers.add({"a": [-1.5, True], ("b", 2): "text"})
    answers.add({"c": None})
    again = Answers(path, "key")
    assert [again.get(one) for one in ("a", ("b", 2), "c", "d")] == [[-1.5, True], "text", None, None] and len(again) == 3
    whole = path.read_bytes()
    for torn in range(len(whole)):  # a kill may leave any beginning of the file
        path.write_bytes(whole[:torn])
        left = Answers(path, "key")
        assert len(left) == max(0, whole[:torn].count(b"\n") - 1)
        left.add({"a": [-1.5, True], ("b", 2): "text", "c": None})
        assert len(Answers(path, "key")) == 3


def test_answers_of_another_key_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "retro.jsonl"
    Answers(path, "key").add({"a": 1})
    other = Answers(path, "other")
    assert other.get("a") is None
    other.add({"b": 2})
    assert Answers(path, "key").get("a") is None and Answers(path, "other").get("b") == 2
