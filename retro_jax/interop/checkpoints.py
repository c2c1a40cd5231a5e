"""Checkpoints as folders: which files hold the tensors of each format and the settings of the model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.config import ModelConfig, resolved
from retro_jax.errors import UserError
from retro_jax.field_types import config_from_plain
from retro_jax.interop import HUGGINGFACE, RETRO, RUN
from retro_jax.interop.convert import AsOurs, Written
from retro_jax.interop.files import SUFFIX, Fact, NpzSource, SafetensorsSource, Source
from retro_jax.interop.format import OURS, Entry, Format, entries
from retro_jax.interop.huggingface import format_of, hugging_face_config, model_config
from retro_jax.interop.megatron import CORE, LEGACY, TRANSFORMER_ENGINE, as_stored, refuse_for_megatron
from retro_jax.interop.ranks import RanksSource, deal
from retro_jax.interop.shards import SafetensorsShards
from retro_jax.progress import progress_bar

MEGATRON = {format_.name: format_ for format_ in (CORE, TRANSFORMER_ENGINE, LEGACY)}
CONFIG_FILE, RANK_FOLDER, OURS_TYPE = "config.json", "mp_rank_{:02d}", "retro_jax"
# Megatron pads vocabularies to a multiple of this times the tensor-parallel size.
MEGATRON_VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Opened:
    """A checkpoint read under our names, and what is told of it: where each tensor came from, and which were no weights.
    ``check_rest``, called when all is read that is wanted, checks what nobody read."""

    config: ModelConfig
    source: Source
    entries: list[Entry]
    skipped: list[str]
    check_rest: Callable[[], None] = lambda: None


def open_checkpoint(kind: str, path: Path, config: ModelConfig | None, *, pickles: bool = False, which: str = "latest") -> Opened:
    """Open a checkpoint of any format in ``READ``.

    Args:
        kind: the format.
        path: its folder or file.
        config: the model's; needed for Megatron, whose checkpoints do not say it in a form that can be read safely.
        pickles: whether PyTorch's pickles may be read (weights only).
        which: the checkpoint of a run: "latest", "best" or a step.

    Raises:
        UserError: it is not there, cannot be read, or does not fit the config.
    """
    if not path.exists():
        raise UserError(f"--input {path} is not there")
    if kind == RUN:
        return _open_run(path, which)
    if kind in MEGATRON:
        if config is None:
            raise UserError(f"--from {kind} needs --config, a gin file with the model's settings")
        return _open_megatron(path, MEGATRON[kind], config, pickles)
    settings = _settings(path)
    if kind == HUGGINGFACE:
        config = config or model_config(settings)
        return _opened(_tensors(path, pickles), format_of(settings), config)
    if config is None:
        config = _our_config(path, settings)
    return _opened(_tensors(path, pickles), OURS, config)


def kind_of(path: Path) -> str:
    """The format of a checkpoint that says itself what it is: a run's, ours, or Hugging Face's.

    Raises:
        UserError: it is none of these.
    """
    if (path / "checkpoints").is_dir():
        return RUN
    if not (path / CONFIG_FILE).exists():
        raise UserError(
            f"{path} holds neither checkpoints/, as a trained model's folder does, nor {CONFIG_FILE}, as a converted one"
        )
    kind = _settings(path).get("model_type")
    if kind in MEGATRON:
        raise UserError(
            f"{path} is a checkpoint of {kind}; make it ours first: python -m retro_jax convert --from {kind} --to {RETRO}"
        )
    return RETRO if kind == OURS_TYPE else HUGGINGFACE


def write_checkpoint(
    kind: str, folder: Path, opened: Opened, *, dtype: np.dtype | None = None, ranks: int = 1, shard_bytes: int | None = None
) -> list[Entry]:
    """Write a checkpoint of any format in ``WRITTEN`` into an empty folder; returns what was written from where.

    Raises:
        UserError: the format cannot hold the model; the message names the setting. Or what is read proves to be broken.
    """
    config, sharding = opened.config, {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    if kind == HUGGINGFACE:
        settings = hugging_face_config(config)
        written = Written.of(opened.source, format_of(settings), config, dtype=dtype)
        settings["dtype"] = str(next(iter(written.facts.values())).dtype)
    elif kind == RETRO:
        settings = {"model_type": OURS_TYPE, "model": resolved(config)}
        written = Written.of(opened.source, OURS, config, dtype=dtype)
    else:
        refuse_for_megatron(config, MEGATRON[kind])
        settings = {"model_type": kind, "tensor_model_parallel_size": ranks, "model": resolved(as_stored(config))}
        multiple = MEGATRON_VOCAB_MULTIPLE * ranks if ranks > 1 else 1
        written = Written.of(opened.source, MEGATRON[kind], config, dtype=dtype, vocab_multiple=multiple)
    splits = {name: entry.split for entry in written.entries for name in entry.theirs}
    folders = [folder / RANK_FOLDER.format(rank) for rank in range(ranks)] if kind in MEGATRON else [folder]
    sinks = []
    for rank, rank_folder in enumerate(folders):
        rank_folder.mkdir(exist_ok=True)
        facts = {name: _rank_fact(fact, splits[name], len(folders), rank) for name, fact in written.facts.items()}
        sinks.append(SafetensorsShards(rank_folder, facts, **sharding))
    with progress_bar(f"writing {kind}", len(written.facts)) as bar:
        for name, tensor in written.tensors():
            for sink, part in zip(sinks, deal(tensor, splits[name], len(sinks)), strict=True):
                sink.write(name, part)
            bar.advance()
    for sink in sinks:
        sink.finish()
    opened.check_rest()
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    return written.entries


def backbone(opened: Opened) -> Opened:
    """The decoder without chunked cross-attention and encoder: the same model with retrieval off."""
    return dataclasses.replace(opened, config=dataclasses.replace(opened.config, retro=None))


def _opened(source: Source, theirs: Format, config: ModelConfig) -> Opened:
    read = AsOurs(source, theirs, config)
    return Opened(config, read, read.correspondences(), read.skipped)


def _open_run(path: Path, which: str) -> Opened:
    from retro_jax.interop.runs import RunSource

    source = RunSource(path, which)
    return Opened(source.config, source, entries(source.config, OURS), [], source.read_the_rest)


def _tensors(path: Path, pickles: bool) -> Source:
    """The tensors of a file or a folder."""
    if path.suffix == ".npz":
        return NpzSource(path)
    pickled = (
        sorted(path.glob("*.pt")) + sorted(path.glob("*.bin")) if path.is_dir() else [path] * (path.suffix in (".pt", ".bin"))
    )
    if pickled and not (path.is_dir() and any(path.glob(f"*{SUFFIX}"))):
        if not pickles:
            raise UserError(
                f"{pickled[0]} is a pickle; allow it to be read (weights only) with --allow-pickle, or give safetensors"
            )
        if importlib.util.find_spec("torch") is None:
            raise UserError(
                f"{pickled[0]} is a pickle, and torch is not installed, which reads it; install it, or give safetensors"
            )
        from retro_jax.interop.pickles import PickleSource

        return PickleSource(pickled)
    return SafetensorsSource(path)


def _open_megatron(path: Path, theirs: Format, config: ModelConfig, pickles: bool) -> Opened:
    """The ranks' tensors as one; a config without a vocabulary gets the checkpoint's, padding included."""
    folders = (sorted(path.glob("mp_rank_*")) if path.is_dir() else []) or [path]
    if stages := [folder.name for folder in folders if folder.name.count("_") > 2 and folder != path]:
        raise UserError(f"{path / stages[0]} is a pipeline stage; convert the checkpoint to pipeline size 1 first")
    named = entries(dataclasses.replace(config, vocab_size=config.vocab_size or 1), theirs)
    splits = {name: entry.split for entry in named for name in entry.theirs}
    source = RanksSource([_tensors(folder, pickles) for folder in folders], splits)
    if config.vocab_size is None:
        (table,) = (entry.theirs[0] for entry in named if entry.ours == ("embedding.table",))
        rows = source.facts[table].shape[0] if table in source.facts else 1
        config = dataclasses.replace(config, vocab_size=rows)
    return _opened(source, theirs, config)


def _settings(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / CONFIG_FILE
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file} is not there; it says what the model is") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error})") from error


def _our_config(path: Path, settings: dict[str, Any]) -> ModelConfig:
    try:
        return config_from_plain(ModelConfig, settings["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not in our format: its {CONFIG_FILE} holds no model of ours ({error})") from error


def _rank_fact(fact: Fact, split: Any, ranks: int, rank: int) -> Fact:
    return Fact(deal(np.broadcast_to(np.zeros((), np.bool_), fact.shape), split, ranks)[rank].shape, fact.dtype)
