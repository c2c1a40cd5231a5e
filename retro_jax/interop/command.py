"""``python -m retro_jax convert``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from retro_jax.errors import UserError
from retro_jax.gin_config import config_text, load_config
from retro_jax.interop import HUGGINGFACE
from retro_jax.interop.checkpoints import (
    MEGATRON,
    Opened,
    backbone,
    open_checkpoint,
    write_checkpoint,
)
from retro_jax.interop.files import new_folder
from retro_jax.interop.format import Entry
from retro_jax.interop.megatron import megatron_warnings
from retro_jax.interop.tokenizer_files import TOKENIZER, add_tokenizer
from retro_jax.interop.verify import verify
from retro_jax.training.start import open_start

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def convert(arguments: argparse.Namespace) -> None:
    """Read, check, write, and tell what went where."""
    if arguments.tokenizer and arguments.target != HUGGINGFACE:
        raise UserError(f"--tokenizer goes with --to {HUGGINGFACE}; leave it out for --to {arguments.target}")
    config = load_config([arguments.config], arguments.overrides).model if arguments.config else None
    opened = open_checkpoint(
        arguments.source, Path(arguments.input), config, pickles=arguments.allow_pickle, which=arguments.checkpoint
    )
    for name in opened.skipped:
        print(f"skipped {name}: not a weight", file=sys.stderr)
    if arguments.target == HUGGINGFACE and opened.config.retro is not None:
        print(
            "Hugging Face has no chunked cross-attention: the decoder is written without it and without the encoder",
            file=sys.stderr,
        )
        opened = backbone(opened)
    if arguments.target in MEGATRON:
        for warning in megatron_warnings(opened.config):
            print(f"note: {warning}", file=sys.stderr)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    with new_folder(Path(arguments.output)) as folder:
        written = write_checkpoint(arguments.target, folder, opened, dtype=dtype, ranks=arguments.tensor_parallel)
        if arguments.tokenizer:
            add_tokenizer(Path(arguments.tokenizer), folder)
        if arguments.verify:
            print(verify(opened, arguments.source, Path(arguments.input), arguments.target, folder, dtype))
    if arguments.report:
        _report(opened, written)
    print(f"{sum(len(entry.theirs) for entry in written)} tensors written to {arguments.output}")


def start_config(path: Path) -> str:
    """A gin file that trains on from a checkpoint: its model's settings, and its tokenizer where that lies beside it.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    config = open_start(str(path)).config
    lines = [config_text(config), f"TrainConfig.start_from = {str(path)!r}\n"]
    if (path / TOKENIZER).is_file():
        lines.append(f"TokenizerConfig.kind = 'tokenizer_json'\nTokenizerConfig.path = {str(path / TOKENIZER)!r}\n")
    return "\n".join(lines)


def _report(opened: Opened, written: list[Entry]) -> None:
    """Each of our parameters with where it was read from and where it went."""
    read_from = {name: entry.theirs for entry in opened.entries for name in entry.ours}
    table = Table("read from", "parameter", "shape", "written to")
    for entry in written:
        for name in entry.ours:
            table.add_row("\n".join(read_from[name]), name, str(opened.source.facts[name].shape), "\n".join(entry.theirs))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
