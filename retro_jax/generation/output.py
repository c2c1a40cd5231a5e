"""Completions as JSON lines, written as they come; a file that was begun is gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from retro_jax.errors import UserError
from retro_jax.generation.prompt import Completion, Prompt


class CompletionFile:
    """One line a completion, in the order in which they end; use as a context manager.

    Each line says which prompt it belongs to (``number``, ``prompt``, ``seed``, ``passages``), and with ``run`` what decided the
    answer. A last line that a kill cut short is dropped.

    Args:
        path: the file; its folder is made.
        prompts: all prompts.
        run: the fingerprint of settings, model and data.

    Attributes:
        left: numbers of the prompts without a line.

    Raises:
        UserError: the file holds completions of other prompts or of another run.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], run: str) -> None:
        if path.is_dir():
            raise UserError(f"--output {path} is a folder; name a file")
        self._path, self._prompts, self._run = path, prompts, run
        done, self._whole = self._read_done()
        self.left = [number for number in range(len(prompts)) if number not in done]

    def __enter__(self) -> CompletionFile:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab")
        self._file.truncate(self._whole)
        return self

    def add(self, number: int, completion: Completion, neighbours: list | None = None) -> None:
        """Write one completion, and let it reach the disk."""
        line = {
            "number": number,
            **self._asked(number),
            "text": completion.text,
            "finish": completion.finish,
            "tokens": completion.tokens,
            "log_probabilities": [round(value, 6) for value in completion.log_probabilities],
            **({} if neighbours is None else {"neighbours": neighbours}),
            "run": self._run,
        }
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _asked(self, number: int) -> dict:
        prompt = self._prompts[number]
        passages = {} if prompt.passages is None else {"passages": list(prompt.passages)}
        return {"prompt": prompt.text, **passages, "seed": prompt.seed}

    def _read_done(self) -> tuple[set[int], int]:
        """The prompts that have a line, and how many bytes of the file are whole lines."""
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data.rfind(b"\n") + 1
        done = set()
        for line_number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                found = json.loads(line)
                number, run = found["number"], found["run"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"--output {self._path} line {line_number} is no completion; name another file") from None
            if run != self._run:
                raise UserError(
                    f"--output {self._path} was begun with other settings, another model or other data; name another file, or "
                    "delete it"
                )
            same = number in range(len(self._prompts)) and all(found.get(k) == v for k, v in self._asked(number).items())
            if not same:
                raise UserError(
                    f"--output {self._path} line {line_number} completes another prompt {number} than is asked now; name another "
                    "file, or delete it"
                )
            done.add(number)
        return done, whole
