"""What a model gave for each prompt of an evaluation, written down as it comes: a killed evaluation goes on where it stood."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from retro_jax.artefact import write_text
from retro_jax.generation.prompt import Completion, Prompt
from retro_jax.progress import progress_bar
from retro_jax.sole_writer import sole_writer

Answerer = Callable[[Sequence[Prompt]], Iterable[Completion]]
OUTPUTS, SETTINGS = "outputs.jsonl", "settings.json"
WRITTEN = ("text", "tokens", "log_probabilities", "finish")


def completed(folder: Path, name: str, settings: Mapping, prompts: Sequence[Prompt], answerer: Answerer) -> list[Completion]:
    """The completion of every prompt: those that an earlier run wrote down, then the answerer's.

    They stand in ``<folder>/<name>-<key>/outputs.jsonl``, a line each in the prompts' order; the key tells settings and prompts,
    so that what was made otherwise is never taken up. Whatever ends the run, what is written stays.

    Args:
        folder: of the task.
        name: of the questions, the model and the mode.
        settings: all that decides the completions beside the prompts.
        prompts: what is asked.
        answerer: completes prompts in order, each independently of the others.

    Raises:
        UserError: another process writes the same, or the answerer's.
    """
    described = {**settings, "prompts": _digest([asdict(prompt) for prompt in prompts])}
    place = folder / f"{name}-{_digest(described)[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    with sole_writer(place):
        write_text(place / SETTINGS, json.dumps(described, indent=2) + "\n")
        done = _read(place / OUTPUTS)[: len(prompts)]
        if len(done) == len(prompts):
            return done
        with _appended(place / OUTPUTS) as write, progress_bar(name, len(prompts), len(done)) as bar:
            for completion in answerer(prompts[len(done) :]):
                write(json.dumps({name: getattr(completion, name) for name in WRITTEN}, ensure_ascii=False))
                done.append(completion)
                bar.advance()
    assert len(done) == len(prompts), f"{len(done)} completions of {len(prompts)} prompts"
    return done


def _read(path: Path) -> list[Completion]:
    """The completions of the whole lines; what a kill left of a last line is cut off."""
    if not path.exists():
        return []
    found, whole = [], 0
    with open(path, "rb") as file:
        for line in file:
            try:
                completion = _completion(json.loads(line)) if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                completion = None
            if completion is None:
                break
            found.append(completion)
            whole += len(line)
    os.truncate(path, whole)
    return found


def _completion(fields: Mapping) -> Completion:
    return Completion(
        text=fields["text"],
        tokens=tuple(fields["tokens"]),
        log_probabilities=tuple(fields["log_probabilities"]),
        finish=fields["finish"],
    )


@contextmanager
def _appended(path: Path) -> Iterator[Callable[[str], None]]:
    with open(path, "a", encoding="utf-8") as file:

        def write(line: str) -> None:
            file.write(line + "\n")
            file.flush()

        yield write
        os.fsync(file.fileno())


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
