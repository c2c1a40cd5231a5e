"""What a model has answered so far, one JSON line each: an evaluation that is killed goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Answers:
    """Results by question, in a file that only grows; whatever kills the program, finished lines stay.

    Args:
        path: the file; made, with its folder, when something is added.
        key: what the answers depend on beside their questions (parameters, data, settings); a file with another is begun anew.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._known: dict[str, Any] = {}
        self._size = self._read() if path.exists() else 0

    def __len__(self) -> int:
        return len(self._known)

    def get(self, question: Any) -> Any:
        """The answer; None if there is none."""
        return self._known.get(_digest(question))

    def add(self, answers: Mapping[Any, Any]) -> None:
        """Keep answers (JSON); they are on the disk when this returns."""
        lines = [[_digest(question), answer] for question, answer in answers.items()]
        if self._size == 0:
            lines.insert(0, ["key", self._key])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "r+b" if self._size else "wb") as file:
            file.seek(self._size)
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.truncate()  # of a line that a kill left unfinished
            file.flush()
            os.fsync(file.fileno())
            self._size = file.tell()
        self._known.update({_digest(question): answer for question, answer in answers.items()})

    def _read(self) -> int:
        """Take up the lines that are whole; the bytes that they fill."""
        size = 0
        for number, line in enumerate(self._path.read_bytes().splitlines(keepends=True)):
            try:
                question, answer = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or (number == 0 and [question, answer] != ["key", self._key]):
                break
            if number:
                self._known[question] = answer
            size += len(line)
        return size


def _digest(question: Any) -> str:
    return hashlib.sha256(repr(question).encode()).hexdigest()[:32]
