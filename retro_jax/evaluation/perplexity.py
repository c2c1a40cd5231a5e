"""Perplexity and bits per byte on whole held-out documents: with retrieval on, off and shuffled, and by overlap."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np
from flax import nnx

from retro_jax.artefact import write_text
from retro_jax.config import Config
from retro_jax.data.held_out import HeldOutRows, held_out_rows, shuffled_donors, spread_documents
from retro_jax.data.reader import RowReader, neighbour_filter, open_reader
from retro_jax.errors import UserError
from retro_jax.evaluation.figures import figures, sum_documents
from retro_jax.evaluation.overlap import overlap_shares
from retro_jax.evaluation.report import draw_overlap, in_words
from retro_jax.evaluation.scores import ChunkScores, load_scores, loss_step, save_scores, score_chunks
from retro_jax.model import Retro
from retro_jax.training.step import compute_dtype

if TYPE_CHECKING:
    from retro_jax.prepare import Prepared

Mode = Literal["plain", "on", "off", "shuffled"]
VERSIONS = ("retro-jax", "jax", "flax", "numpy", "grain", "tokenizers")


@dataclass(frozen=True)
class Pass:
    """One model in one mode; ``row`` names it in the result: "gpt", "retro", "retro off", "retro shuffled"."""

    row: str
    model: Retro
    mode: Mode
    digest: str


def evaluate_perplexity(
    config: Config, prepared: Prepared, models: Mapping[str, Retro], folder: Path, *, steps: Mapping[str, int] | None = None
) -> dict:
    """Score models on the held-out documents of ``config.evaluation.split``, and say what comes out.

    Writes ``perplexity-<split>.json`` and ``.png`` into ``folder``, and the sums by chunk of each model and mode into
    ``perplexity-<split>/``; sums that stand there for the same parameters, data and settings are not computed again.

    Args:
        config: its evaluation, chunks, and ``training``'s precision and loss_chunk are read.
        prepared: the data stages' artefacts.
        models: by name, with float32 parameters. A model with retrieval is scored in three modes: with its neighbours,
            without, and with another chunk's.
        folder: where results go.
        steps: the checkpoint's step of each model, for the record.

    Returns:
        What the JSON file holds: see :func:`retro_jax.evaluation.figures.figures`; with ``documents``, ``targets``, ``bytes``,
        ``in_words``, versions and fingerprints.

    Raises:
        UserError: the split has no text.
    """
    split = config.evaluation.split
    table = prepared.tables[split]
    documents = spread_documents(table, config.evaluation.max_documents)
    rows = held_out_rows(table, window=config.evaluation.window, stride=config.evaluation.stride, documents=documents)
    if len(rows) == 0:
        raise UserError(
            f"the {split} split has no text; raise CorpusConfig.{split}_fraction, give more documents, "
            "or choose another EvalConfig.split"
        )
    sums_folder = folder / f"perplexity-{split}"
    sums_folder.mkdir(parents=True, exist_ok=True)
    passes = sorted(_passes(models), key=lambda one: one.mode != "plain")  # a table reads better with baselines first
    scores = {one.row: _scored(one, config, prepared, rows, sums_folder) for one in passes}
    overlap_N = overlap_shares(config, prepared, documents, sums_folder)
    result = _result(config, prepared, passes, scores, overlap_N, steps or {})
    write_text(folder / f"perplexity-{split}.json", json.dumps(result, indent=2) + "\n")
    draw_overlap(result, folder / f"perplexity-{split}.png")
    return result


def parameters_digest(model: Retro) -> str:
    """A fingerprint of a model's config and the values of its parameters."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config), sort_keys=True).encode())
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        values = np.ascontiguousarray(leaf[...])
        digest.update(f"{path} {values.dtype} {values.shape}".encode())
        digest.update(values.view(np.uint8).data if values.size else b"")
    return digest.hexdigest()[:16]


def _passes(models: Mapping[str, Retro]) -> Iterator[Pass]:
    for name, model in models.items():
        digest = parameters_digest(model)
        if model.config.retro is None or model.config.retro.gate == 0.0:
            yield Pass(name, model, "plain", digest)
        else:
            yield Pass(name, model, "on", digest)
            yield Pass(f"{name} off", model, "off", digest)
            yield Pass(f"{name} shuffled", model, "shuffled", digest)


def _scored(one: Pass, config: Config, prepared: Prepared, rows: HeldOutRows, folder: Path) -> ChunkScores:
    """The sums by chunk of one pass: as stored, or computed."""
    evaluation = config.evaluation
    reads = {
        "model": one.digest,
        "mode": one.mode,
        "data": prepared.fingerprints,
        "chunks": dataclasses.asdict(config.chunks),
        "filter": dataclasses.asdict(neighbour_filter(config)),
        "windows": [evaluation.split, evaluation.window, evaluation.stride, evaluation.max_documents],
        "seed": evaluation.seed if one.mode == "shuffled" else None,
        "dtype": str(compute_dtype(config.training)),
    }
    key = hashlib.sha256(json.dumps(reads, sort_keys=True).encode()).hexdigest()
    path = folder / f"{one.row.replace(' ', '-')}.npz"
    stored = load_scores(path, key)
    if stored is not None:
        print(
            f"{one.row} on {evaluation.split}: nothing left to do, results of the same parameters and data are there",
            file=sys.stderr,
        )
        return stored[0]
    step = loss_step(one.model, config.training, retrieval=one.mode in ("on", "shuffled"))
    partial = path.with_suffix(".partial.npz")
    scores = score_chunks(
        step,
        rows,
        _reader(one.mode, config, prepared),
        prepared.tokenizer,
        evaluation.batch_size,
        partial=partial,
        key=f"{key} in batches of {evaluation.batch_size}",
        name=f"{one.row} on {evaluation.split}",
    )
    save_scores(path, key, scores, -(-len(rows) // evaluation.batch_size))
    partial.unlink(missing_ok=True)
    return scores


def _reader(mode: Mode, config: Config, prepared: Prepared) -> RowReader:
    split = config.evaluation.split
    donors = None
    if mode == "shuffled":
        donors = shuffled_donors(
            prepared.tables[split],
            prepared.neighbours[split],
            config.chunks.num_neighbours,
            keep=neighbour_filter(config),
            seed=config.evaluation.seed,
        )
    return open_reader(config, prepared, split, neighbours=mode in ("on", "shuffled"), donors=donors)


def _result(
    config: Config,
    prepared: Prepared,
    passes: list[Pass],
    scores: Mapping[str, ChunkScores],
    overlap_N: np.ndarray,
    steps: Mapping[str, int],
) -> dict:
    evaluation, table = config.evaluation, prepared.tables[config.evaluation.split]
    sums = sum_documents(scores, overlap_N, np.asarray(table.document_N))
    result = {
        "split": evaluation.split,
        "window": evaluation.window,
        "stride": evaluation.stride,
        "chunk_len": config.chunks.chunk_len,
        "documents": len(sums.targets_D),
        "targets": int(sums.targets_D.sum()),
        "bytes": int(sums.bytes_BD.sum()),
        "end_of_document": "a target that counts bits and no bytes",
        "intervals": f"95%, percentiles over {evaluation.bootstrap_samples} resamples of documents; differences paired",
        "overlap": f"longest token run shared with one of {evaluation.overlap_neighbours} neighbours and their continuations, or "
        "found by the exact 8-token look-up in all training text, divided by the chunk's length",
        **figures(sums, _pairs(passes), samples=evaluation.bootstrap_samples, seed=evaluation.seed),
        "steps": dict(steps),
        "parameters": {one.row: one.digest for one in passes},
        "data": dict(prepared.fingerprints),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "device": jax.devices()[0].device_kind,
    }
    return {**result, "in_words": in_words(result)}


def _pairs(passes: list[Pass]) -> list[tuple[str, str]]:
    """Plain models, and the other modes, against each model with its neighbours."""
    with_neighbours = [one for one in passes if one.mode == "on"]
    return [
        (other.row, one.row)
        for one in with_neighbours
        for other in passes
        if other.mode == "plain" or (other.model is one.model and other.mode in ("off", "shuffled"))
    ]
