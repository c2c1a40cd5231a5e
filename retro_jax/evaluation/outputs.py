"""What a model gave for each prompt of an evaluation, written down as it comes: a killed evaluation goes on where it stood."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from retro_jax.artefact import write_text
from retro_jax.generation.prompt import Completion, Prompt
from retro_jax.progress import progress_bar
from retro_jax.sole_writer import sole_writer

# Completes those prompts whose number is not among the given ones, in any order.
Answerer = Callable[[Sequence[Prompt], Collection[int]], Iterable[tuple[int, Completion]]]
OUTPUTS, SETTINGS = "outputs.jsonl", "settings.json"
WRITTEN = ("text", "tokens", "log_probabilities", "finish")


def completed(folder: Path, name: str, settings: Mapping, prompts: Sequence[Prompt], answerer: Answerer) -> list[Completion]:
    """The completion of every prompt: those that an earlier run wrote down, then the answerer's.

    They stand in ``<folder>/<name>-<key>/outputs.jsonl``, a line each with the prompt's number; the key tells settings and
    prompts, so that what was made otherwise is never taken up. Whatever ends the run, what is written stays.

    Args:
        folder: of the task.
        name: of the questions, the model and the mode.
        settings: all that decides the completions beside the prompts.
        prompts: what is asked.
        answerer: completes prompts.

    Returns:
        The completions in the prompts' order.

    Raises:
        UserError: another process writes the same, or the answerer's.
    """
    described = {**settings, "prompts": _digest([asdict(prompt) for prompt in prompts])}
    place = folder / f"{name}-{_digest(described)[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    with sole_writer(place):
        write_text(place / SETTINGS, json.dumps(described, indent=2) + "\n")
        done = _read(place / OUTPUTS)
        if len(done) < len(prompts):
            known, began = len(done), time.monotonic()
            with _appended(place / OUTPUTS) as write, progress_bar(name, len(prompts), known) as bar:
                for number, completion in answerer(prompts, frozenset(done)):
                    fields = {name: getattr(completion, name) for name in WRITTEN}
                    write(json.dumps({"number": number, **fields}, ensure_ascii=False))
                    done[number] = completion
                    bar.advance(note=f"{(len(done) - known) / (time.monotonic() - began):.1f}/s")
    return [done[number] for number in range(len(prompts))]


def _read(path: Path) -> dict[int, Completion]:
    """The completions of the whole lines, by number; what a kill left of a last line is cut off."""
    found: dict[int, Completion] = {}
    whole = 0
    if not path.exists():
        return found
    with open(path, "rb") as file:
        for line in file:
            try:
                fields = json.loads(line) if line.endswith(b"\n") else {}
                found[fields["number"]] = _completion(fields)
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
    if whole < path.stat().st_size:
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
