"""Questions with their gold answers from JSON lines, in the shapes in which question sets are published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retro_jax.corpus.text_files import read_json_lines
from retro_jax.errors import UserError

YES_NO = ("yes", "no")


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text that may hold the answer."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, what counts as its answer, and the passages that its file gives, best first.

    ``choices``: the answer is one of these, ``answers`` has it alone; empty: it is free. ``asked`` says that ``text`` is a whole
    prompt, as files of choices have it, and not a question to be put into one.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...] = ()
    choices: tuple[str, ...] = ()
    asked: bool = False


@dataclass(frozen=True, kw_only=True)
class PassageIds:
    """Texts that questions name by id: what ``passage_ids`` and ``gold_passage_ids`` mean."""

    path: Path | None = None
    texts: Mapping[str, Passage] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | None) -> PassageIds:
        """The passages of a file of JSON lines with ``id``, ``title`` and ``text``; None: none.

        Raises:
            UserError: it cannot be read, or a line lacks one of these.
        """
        if path is None:
            return cls()
        texts = {}
        for where, fields in _lines(Path(path), "QaConfig.passages"):
            if not isinstance(fields, Mapping) or not isinstance(fields.get("text"), str) or "id" not in fields:
                raise UserError(f"{where} lacks id or text; give each passage of QaConfig.passages both")
            texts[str(fields["id"])] = Passage(title=str(fields.get("title") or ""), text=fields["text"])
        return cls(path=Path(path), texts=texts)

    def of(self, ids: Sequence[Any], where: str) -> tuple[Passage, ...]:
        """The passages with these ids; none where no file of passages is given."""
        if self.path is None:
            return ()
        for one in ids:
            if str(one) not in self.texts:
                raise UserError(f"{where} names the passage {one!r}, which {self.path} does not have; name the file that has it")
        return tuple(self.texts[str(one)] for one in ids)


def read_questions(path: str, passages: PassageIds, setting: str = "QaConfig.questions") -> list[Question]:
    """The questions of a file, plain or compressed.

    A line has ``question`` with ``answers`` (a list, or SQuAD's {"text": [...]}), ``answer`` with ``answer_aliases`` (MuSiQue,
    HotpotQA), or true or false (BoolQ); or ``query`` with ``choices`` and ``gold``; or ``context`` with ``continuation``.
    Passages are read from ``ctxs`` or ``contexts`` (DPR, FiD), ``paragraphs`` (MuSiQue), ``context`` (SQuAD; HotpotQA's pairs of
    title and sentences), ``passage`` (BoolQ), or ``passage_ids``.

    Raises:
        UserError: the file cannot be read, is empty, or a line has no question or no answer; it is named.
    """
    questions = [_question(fields, where, passages) for where, fields in _lines(Path(path), setting)]
    if not questions:
        raise UserError(f"{setting}={path!r} holds no question; give a file of JSON lines with question and answers")
    return questions


def _lines(path: Path, setting: str) -> list[tuple[str, object]]:
    try:
        return list(read_json_lines(path))
    except OSError as error:
        raise UserError(f"{setting}={str(path)!r} cannot be read ({error.strerror or error}); check the path") from None


def _question(fields: object, where: str, ids: PassageIds) -> Question:
    if not isinstance(fields, Mapping):
        raise UserError(f"{where} is not a JSON object; write one with question and answers")
    number = str(fields.get("id", fields.get("_id", where.rpartition(" ")[2])))
    if "choices" in fields:
        return _choice(fields, where, number)
    if "continuation" in fields:
        text, answers = fields.get("context"), (fields["continuation"],)
        fields = {name: value for name, value in fields.items() if name != "context"}
    else:
        text, answers = fields.get("question"), _answers(fields)
    passages = _passages(fields, where, ids)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has no question; give it the field question, a text")
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise UserError(f"{where} has no answers; give it the field answers, a list of texts")
    choices = YES_NO if isinstance(fields.get("answer"), bool) else ()
    asked = "continuation" in fields
    text = text if asked else text.strip()
    return Question(id=number, text=text, answers=tuple(answers), passages=passages, choices=choices, asked=asked)


def _choice(fields: Mapping, where: str, number: str) -> Question:
    query, choices, gold = fields.get("query"), fields["choices"], fields.get("gold")
    if not isinstance(query, str) or not query.strip():
        raise UserError(f"{where} has choices but no query; give it the field query, a text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one.strip() for one in choices):
        raise UserError(f"{where} has choices={choices!r}; give two texts or more")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise UserError(f"{where} has gold={gold!r}, which is no number of a choice, 0 to {len(choices) - 1}")
    return Question(id=number, text=query, answers=(choices[gold],), choices=tuple(choices), asked=True)


def _answers(fields: Mapping) -> tuple[Any, ...]:
    answers = fields.get("answers")
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    if isinstance(answers, list) and all(isinstance(one, Mapping) for one in answers):
        answers = [one.get("text") for one in answers]
    if answers is None and "answer" in fields:
        answer = fields["answer"]
        answer = YES_NO[not answer] if isinstance(answer, bool) else answer
        answers = [answer, *(fields.get("answer_aliases") or ())] if isinstance(answer, str) else answer
    return tuple(dict.fromkeys(answers)) if isinstance(answers, list) and all(isinstance(a, str) for a in answers) else ()


def _passages(fields: Mapping, where: str, ids: PassageIds) -> tuple[Passage, ...]:
    title = str(fields.get("title") or "")
    for name in ("ctxs", "contexts", "paragraphs"):
        if isinstance(fields.get(name), list):
            return tuple(_passage(one, where, name) for one in fields[name])
    context = fields.get("context", fields.get("passage"))
    if isinstance(context, str) and context.strip():
        return (Passage(title=title, text=context),)
    if isinstance(context, Mapping):  # HotpotQA as tables
        context = list(zip(context.get("title", ()), context.get("sentences", ()), strict=False))
    if isinstance(context, list):
        return tuple(_passage(one, where, "context") for one in context)
    return ids.of(fields.get("passage_ids") or fields.get("gold_passage_ids") or (), where)


def _passage(one: Any, where: str, name: str) -> Passage:
    if isinstance(one, str):
        return Passage(title="", text=one)
    if isinstance(one, Sequence) and len(one) == 2 and isinstance(one[1], list):
        return Passage(title=str(one[0]), text="".join(map(str, one[1])))
    text = one.get("text", one.get("paragraph_text")) if isinstance(one, Mapping) else None
    if not isinstance(text, str):
        raise UserError(f"{where} has an entry of {name} that is no text and no object with text; mend it or leave it out")
    return Passage(title=str(one.get("title") or ""), text=text)
