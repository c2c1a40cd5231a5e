"""Question files in the shapes in which they are published, and what is said of those that are not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from retro_jax.errors import UserError
from retro_jax.evaluation.questions import Passage, PassageIds, Question, read_questions

# Natural Questions, SQuAD, MuSiQue, HotpotQA, DPR and FiD, BoolQ, choices, cloze.
SHAPES: list[tuple[dict[str, Any], Question]] = [
    (
        {"id": "nq-1", "question": "who?", "answers": ["A", "B", "A"]},
        Question(id="nq-1", text="who?", answers=("A", "B")),
    ),
    (
        {"id": "s", "question": "q", "title": "T", "context": "C", "answers": {"text": ["x", "y"], "answer_start": [1, 2]}},
        Question(id="s", text="q", answers=("x", "y"), passages=(Passage(title="T", text="C"),)),
    ),
    (
        {
            "id": "m",
            "question": "q",
            "answer": "x",
            "answer_aliases": ["z"],
            "paragraphs": [{"title": "T", "paragraph_text": "P"}],
        },
        Question(id="m", text="q", answers=("x", "z"), passages=(Passage(title="T", text="P"),)),
    ),
    (
        {"_id": "h", "question": "q", "answer": "x", "context": [["T", ["One. ", "Two."]]]},
        Question(id="h", text="q", answers=("x",), passages=(Passage(title="T", text="One. Two."),)),
    ),
    (
        {"question": "q", "answer": "x", "context": {"title": ["T"], "sentences": [["One. ", "Two."]]}},
        Question(id="7", text="q", answers=("x",), passages=(Passage(title="T", text="One. Two."),)),
    ),
    (
        {"id": "f", "question": "q", "answers": ["x"], "ctxs": [{"title": "T", "text": "P", "score": 1.0}, "bare"]},
        Question(id="f", text="q", answers=("x",), passages=(Passage(title="T", text="P"), Passage(title="", text="bare"))),
    ),
    (
        {"id": "b", "question": "is it", "passage": "P", "title": "T", "answer": False},
        Question(id="b", text="is it", answers=("no",), passages=(Passage(title="T", text="P"),), choices=("yes", "no")),
    ),
    (
        {"id": "c", "query": "Passage: P\nQ?\nA:", "choices": ["no", "yes"], "gold": 1},
        Question(id="c", text="Passage: P\nQ?\nA:", answers=("yes",), choices=("no", "yes"), asked=True),
    ),
    (
        {"id": "w", "context": "The eye color of X is", "continuation": "blue"},
        Question(id="w", text="The eye color of X is", answers=("blue",), asked=True),
    ),
]


def written(path: Path, *lines: object) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


@pytest.mark.parametrize(("fields", "expected"), SHAPES)
def test_published_shapes(tmp_path: Path, fields: dict, expected: Question) -> None:
    path = written(tmp_path / "items.jsonl", *[SHAPES[0][0]] * 6, fields)
    assert read_questions(path, PassageIds())[-1] == expected


def test_compressed_and_passages_by_id(tmp_path: Path) -> None:
    corpus = written(tmp_path / "wiki.jsonl", {"id": "p-1", "title": "T", "text": "P"}, {"id": 2, "text": "Q"})
    line = {"id": "h", "question": "q", "answers": ["x"], "gold_passage_ids": ["p-1"], "passage_ids": [2, "p-1"]}
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(line).encode()))
    (question,) = read_questions(str(path), PassageIds.read(corpus))
    assert question.passages == (Passage(title="", text="Q"), Passage(title="T", text="P"))
    assert read_questions(str(path), PassageIds())[0].passages == ()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"question": "q"}, "line 2 has no answers; give it the field answers, a list of texts"),
        ({"question": "q", "answers": []}, "line 2 has no answers"),
        ({"question": "q", "answers": [" "]}, "line 2 has no answers"),
        ({"answers": ["x"]}, "line 2 has no question"),
        ({"question": " ", "answers": ["x"]}, "line 2 has no question"),
        (["question"], "line 2 is not a JSON object"),
        ({"query": "q", "choices": ["yes"], "gold": 0}, "give two texts or more"),
        ({"query": "q", "choices": ["yes", "no"], "gold": 2}, "gold=2, which is no number of a choice, 0 to 1"),
        ({"question": "q", "answers": ["x"], "ctxs": [{"title": "T"}]}, "an entry of ctxs that is no text"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: object, sentence: str) -> None:
    path = written(tmp_path / "items.jsonl", SHAPES[0][0], line)
    with pytest.raises(UserError, match="items.jsonl") as raised:
        read_questions(path, PassageIds())
    assert sentence in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"QaConfig.questions='.*none.jsonl' cannot be read"):
        read_questions(str(tmp_path / "none.jsonl"), PassageIds())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(str(tmp_path / "empty.jsonl"), PassageIds())
    (tmp_path / "torn.jsonl").write_text('{"question": ')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_questions(str(tmp_path / "torn.jsonl"), PassageIds())
    ids = PassageIds.read(written(tmp_path / "wiki.jsonl", {"id": "p", "text": "t"}))
    path = written(tmp_path / "items.jsonl", {"question": "q", "answers": ["x"], "passage_ids": ["other"]})
    with pytest.raises(UserError, match=r"line 1 names the passage 'other', which .*wiki.jsonl does not have"):
        read_questions(path, ids)
