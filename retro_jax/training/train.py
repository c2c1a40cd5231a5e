"""From prepared data to trained models: the main one and its baselines, on identical rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from retro_jax.config import Config, ModelConfig, Split
from retro_jax.data.batch import Batch
from retro_jax.data.held_out import HeldOutRows, held_out_batches, held_out_rows
from retro_jax.data.joined_rows import JoinedRows
from retro_jax.data.pipeline import ALL, training_batches
from retro_jax.data.reader import RowReader, open_reader
from retro_jax.data.training_rows import TrainingRows, describe_rows, training_rows
from retro_jax.errors import UserError
from retro_jax.kernels import triton_call
from retro_jax.model import count_parameters, with_vocab
from retro_jax.parallel.axes import AXES
from retro_jax.parallel.layout import make_layout
from retro_jax.parallel.processes import is_first
from retro_jax.training.capacity import automatic_capacity, encoded_share
from retro_jax.training.curves import draw_curves
from retro_jax.training.loop import CHECKPOINTS, Job, ValidBatches, fit
from retro_jax.training.optimizer import is_trained
from retro_jax.training.start import open_start, refuse_other_start
from retro_jax.training.state import model_form
from retro_jax.training.step import compute_dtype
from retro_jax.training.twins import model_name, twin

if TYPE_CHECKING:
    from retro_jax.corpus.chunk_table import ChunkTable
    from retro_jax.prepare import Prepared

MODELS = "models"


def train_all(config: Config, prepared: Prepared, workdir: Path, *, config_text: str = "") -> dict[str, Path]:
    """Train the model and then its baselines, each from its last checkpoint; all see the same rows in the same order.

    Args:
        config: the run's settings.
        prepared: tokenizer, chunks and neighbours.
        workdir: gets ``models/<name>/`` for each model and ``curves.png``.
        config_text: the config as its user would write it, stored in each checkpoint.

    Returns:
        Each model's folder, by name ("retro" or "gpt" first, then the baselines).
    """
    models = model_configs(config, prepared.tokenizer.vocab_size)
    _say_rows(config, prepared)
    folders = {}
    for name, model in models.items():
        folders[name] = workdir / MODELS / name
        train(config, prepared, model, folders[name], name=name, config_text=config_text)
        if is_first():
            draw_curves(workdir)
    return folders


def check_run(config: Config, workdir: Path) -> None:
    """Refuse what could not be trained, before work is spent on the data; say where devices are left idle.

    Raises:
        UserError: the mesh is larger than this machine or does not divide a model, with what to change; the kernels that are
            asked for cannot run here; or a model cannot start from ``TrainConfig.start_from``, with the settings that it needs.
    """
    _check_kernels(config.model)
    _check_mesh(config)
    _check_start(config, workdir)


def _check_kernels(model: ModelConfig) -> None:
    if model.implementation != "triton":
        return
    reason = triton_call.unavailable()
    if reason is None and model.attention_dropout:
        reason = f"its causal kernels have no dropout of weights, and ModelConfig.attention_dropout={model.attention_dropout}"
    if reason is not None:
        raise UserError(f"ModelConfig.implementation='triton' cannot run: {reason}; or leave the setting out for XLA's form")


def model_configs(config: Config, tokenizer_size: int) -> dict[str, ModelConfig]:
    """The models of a run by name, with their vocabulary.

    Raises:
        UserError: the vocabulary is too small, or a baseline cannot be made.
    """
    try:
        main = with_vocab(config.model, tokenizer_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    return {model_name(main): main, **{name: twin(main, name) for name in config.training.baselines}}


def train(
    config: Config, prepared: Prepared, model_config: ModelConfig, folder: Path, *, name: str | None = None, config_text: str = ""
) -> int:
    """Train one model in ``folder``; see :func:`retro_jax.training.loop.fit` for what it returns and raises.

    Args:
        config: the run's settings; its model is not looked at.
        prepared: tokenizer, chunks and neighbours.
        model_config: the model, with ``vocab_size``.
        folder: takes its checkpoints and metrics.
        name: stands in what is printed; None: the folder's name.
        config_text: stored in each checkpoint.
    """
    name = folder.name if name is None else name
    table, weights = prepared.tables["train"], config.corpus.weights
    layout, rows = make_layout(config.mesh), training_rows(table, config.data.seq_len, weights=weights)
    batches = training_batches(
        rows,
        _reader(config, prepared, model_config, "train"),
        config.data,
        weights=weights,
        rows_here=ALL if layout is None else layout.rows_here(config.data.batch_size),
        joined=_joined(config, prepared),
    )
    valid = validation_batches(config, prepared, model_config)
    data, training = config.data, config.training
    print(
        f"{name}: {count_parameters(model_config):,} parameters, {training.steps} steps of {data.batch_size} x {data.seq_len} "
        f"tokens, {compute_dtype(training).name} on {_devices(config)}",
        flush=True,
    )
    read = ("tokenizer", "tokens", "chunks", *(["neighbours"] if _reads_neighbours(model_config) else []))
    job = Job(
        name=name,
        config=_with_capacity(config, model_config, rows, table, name),
        model=model_config,
        folder=folder,
        config_text=config_text,
        data={artefact: prepared.fingerprints[artefact] for artefact in read},
    )
    return fit(job, batches, valid)


def validation_batches(config: Config, prepared: Prepared, model_config: ModelConfig) -> ValidBatches | None:
    """The same ``valid_batches`` batches at each validation, spread evenly over the windows of the valid split.

    None where none is asked for.

    Raises:
        UserError: the valid split has no text.
    """
    wanted, batch_size = config.training.valid_batches, config.data.batch_size
    if wanted == 0 or config.training.valid_every == 0:
        return None
    rows = held_out_rows(prepared.tables["valid"], window=config.data.seq_len, stride=config.data.seq_len)
    if len(rows) == 0:
        raise UserError(
            "the valid split has no text to validate on; raise CorpusConfig.valid_fraction, or set TrainConfig.valid_every=0"
        )
    taken = np.unique(np.linspace(0, len(rows) - 1, wanted * batch_size).round().astype(np.int64))
    spread = HeldOutRows(**{f.name: getattr(rows, f.name)[taken] for f in dataclasses.fields(rows)})
    reader = _reader(config, prepared, model_config, "valid")

    def batches() -> Iterable[tuple[Batch, np.ndarray]]:
        return held_out_batches(spread, reader, batch_size)

    return batches


def _reader(config: Config, prepared: Prepared, model: ModelConfig, split: Split) -> RowReader:
    return open_reader(config, prepared, split, neighbours=_reads_neighbours(model))


def _with_capacity(config: Config, model: ModelConfig, rows: TrainingRows, table: ChunkTable, name: str) -> Config:
    """The config with ``TrainConfig.neighbour_capacity`` in numbers: 1 for a model without retrieval."""
    capacity = config.training.neighbour_capacity
    if not _reads_neighbours(model):
        capacity = 1.0
    elif capacity == "auto":
        capacity = automatic_capacity(config, rows, table)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, neighbour_capacity=capacity))
    if (share := encoded_share(config)) < 1.0:
        print(f"{name}: of a device's chunks at most {share:.1%} have their neighbours encoded, those that are read", flush=True)
    return config


def _joined(config: Config, prepared: Prepared) -> JoinedRows | None:
    if config.data.rows == "gathered":
        return None
    if prepared.joined is None:
        raise ValueError(
            "DataConfig.rows='joined', but the data were prepared without joined rows; prepare them with this config"
        )
    return prepared.joined


def _check_mesh(config: Config) -> None:
    layout, there = make_layout(config.mesh), jax.device_count()
    if config.mesh.devices < there:
        print(f"{config.mesh.devices} of {there} devices are used; MeshConfig says how they share the work", flush=True)
    if layout is not None:
        model = with_vocab(config.model, 1)  # of a vocabulary that is not known yet its multiple counts
        model_form(model, is_trained(model)).specs(layout)


def _check_start(config: Config, workdir: Path) -> None:
    if config.training.start_from is None:
        return
    names = (model_name(config.model), *config.training.baselines)
    if any(not (workdir / MODELS / name / CHECKPOINTS).is_dir() for name in names):
        opened = open_start(config.training.start_from)
        for model in (config.model, *(twin(config.model, name) for name in config.training.baselines)):
            refuse_other_start(opened, model, config.training.start_from)


def _devices(config: Config) -> str:
    sizes = ", ".join(f"{axis} {size}" for axis in AXES if (size := getattr(config.mesh, axis)) > 1)
    return jax.default_backend() + (f" ({config.mesh.devices} devices: {sizes})" if sizes else "")


def _reads_neighbours(model: ModelConfig) -> bool:
    return model.retro is not None and model.retro.gate != 0.0


def _say_rows(config: Config, prepared: Prepared) -> None:
    weights = config.corpus.weights
    rows = training_rows(prepared.tables["train"], config.data.seq_len, weights=weights)
    facts = describe_rows(rows, _reader(config, prepared, config.model, "train"), weights=weights)
    epochs = config.training.steps * config.data.batch_size / facts["rows"]
    told = (
        f"rows: {facts['rows']:,} of {config.data.seq_len} tokens, {facts['padding_share']:.1%} padding, read {epochs:.2f} times"
    )
    if (short := facts["chunks_short_of_neighbours"]) is not None:
        told += f"; {short:,} of {facts['chunks']:,} chunks have fewer than {config.chunks.num_neighbours} neighbours"
    print(told, flush=True)
