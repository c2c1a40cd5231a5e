"""``python -m retro_jax generate``: complete prompts with a run's model."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from retro_jax.config import Config
from retro_jax.errors import UserError
from retro_jax.generation.opening import Opened, open_engine
from retro_jax.generation.output import CompletionFile
from retro_jax.generation.prompt import Completion, Prompt
from retro_jax.generation.prompt_files import read_prompts
from retro_jax.generation.terminal import Shown, Terminal
from retro_jax.progress import progress_bar
from retro_jax.retrieval.answer import AnswerReader


def generate(config: Config, data_dir: Path, workdir: Path, arguments: argparse.Namespace, console: Console) -> None:
    """Complete the prompts: on the console as text comes, and in a file as completions end.

    Args:
        config: the run's settings, ``generation`` among them.
        data_dir: the run's data.
        workdir: holds ``models/``.
        arguments: ``prompt`` (texts), ``prompts`` (a file), ``model``, ``checkpoint``, ``database``,
            ``show_neighbours``, ``output``.
        console: takes the text, except that of a file of prompts whose completions go to a file.

    Raises:
        UserError: what the user can mend; see :func:`retro_jax.generation.opening.open_engine`,
            :meth:`retro_jax.generation.engine.Engine.stream` and :class:`retro_jax.generation.output.CompletionFile`.
    """
    prompts = _prompts(arguments)
    opened = open_engine(
        config,
        data_dir,
        workdir,
        model=arguments.model,
        checkpoint=arguments.checkpoint,
        database=None if arguments.database is None else Path(arguments.database),
    )
    with contextlib.ExitStack() as stack:
        file, numbers = None, list(range(len(prompts)))
        if arguments.output is not None:
            run = f"{opened.digest(config.generation)}{'-neighbours' if arguments.show_neighbours else ''}"
            file = stack.enter_context(CompletionFile(Path(arguments.output), prompts, run))
            numbers = file.left
            if not numbers:
                print(f"{arguments.output}: nothing left to do, all {len(prompts)} prompts are completed")
        _complete(opened, prompts, numbers, arguments, file, console)


def _complete(
    opened: Opened,
    prompts: list[Prompt],
    numbers: list[int],
    arguments: argparse.Namespace,
    file: CompletionFile | None,
    console: Console,
) -> None:
    silent = file is not None and arguments.prompts is not None
    terminal = None if silent else Terminal(prompts, numbers, console)
    reader = None
    if arguments.show_neighbours and opened.database is not None:
        reader = AnswerReader(opened.database, opened.data_dir, opened.engine.chunks.retrieved_len)
    with progress_bar("prompts", len(prompts), len(prompts) - len(numbers), shown=silent) as bar:
        for number, piece, completion in opened.engine.stream(prompts, done=set(range(len(prompts))).difference(numbers)):
            found = [] if completion is None or reader is None else _found(completion, reader)
            if terminal is not None:
                terminal.add(number, piece, completion, found)
            if completion is not None and file is not None:
                file.add(number, completion, _plain(found) if arguments.show_neighbours else None)
            if completion is not None:
                bar.advance()


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise UserError("give either --prompt TEXT, once or several times, or --prompts FILE (- for standard input)")
    prompts = [Prompt(text=text) for text in arguments.prompt] if arguments.prompt else read_prompts(arguments.prompts)
    for number, prompt in enumerate(prompts):  # before a model is loaded
        if not prompt.text:
            raise UserError(f"prompt {number} is empty; give some text to go on from")
    return prompts


def _found(completion: Completion, reader: AnswerReader) -> list[Shown]:
    return [(place.end, place.query, reader.read(place.chunks, place.distances)) for place in completion.retrieved]


def _plain(found: list[Shown]) -> list[dict]:
    return [{"end": end, "query": query, "found": [asdict(answer) for answer in answers]} for end, query, answers in found]
