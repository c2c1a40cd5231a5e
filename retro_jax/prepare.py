"""The data stages in their order: documents -> tokenizer -> tokens -> chunks -> neighbours, each skipped where it stands; and the
training rows joined with their neighbours, where they are asked for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from retro_jax.artefact import MANIFEST, Artefact, open_artefact, remove_artefact
from retro_jax.config import SPLITS, Config, Split
from retro_jax.corpus.chunk_table import ChunkTable, build_chunks, open_chunk_tables
from retro_jax.corpus.token_stage import build_tokens
from retro_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from retro_jax.corpus.tokenizer_stage import build_tokenizer
from retro_jax.errors import UserError
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.neighbours import NeighbourTable, build_database, build_neighbours
from retro_jax.retrieval.ngrams import NgramLookup, build_ngrams

if TYPE_CHECKING:
    from retro_jax.data.joined_rows import JoinedRows

# What each artefact is made from, in the order in which they are made. Its folder and its kind have the same name.
MADE_FROM = {
    "tokenizer": (),
    "tokens": ("tokenizer",),
    "chunks": ("tokens",),
    "ngrams": ("chunks",),
    "embedder": ("chunks",),
    "vectors": ("embedder",),
    "index": ("vectors",),
    "queries": ("embedder",),
    "neighbours": ("index", "queries"),
    "joined": ("chunks", "neighbours"),
}
# Built only where the config asks for them: where what searches is embedded otherwise than what is found, and for joined rows.
ON_REQUEST = ("queries", "joined")
STAGES = tuple(stage for stage in MADE_FROM if stage not in ON_REQUEST)
Made = TypeVar("Made")


@dataclass(frozen=True)
class Prepared:
    """What training and evaluation read; ``ngrams`` looks up training text, ``fingerprints`` by artefact are for what is made
    from them. ``joined``: the training rows in that form, where ``DataConfig.rows`` says so."""

    tokenizer: Tokenizer
    tables: dict[Split, ChunkTable]
    neighbours: dict[Split, NeighbourTable]
    ngrams: NgramLookup
    fingerprints: dict[str, str]
    joined: JoinedRows | None = None


def prepare(
    config: Config,
    data_dir: Path,
    report: Callable[[str], None] = print,
    *,
    build: bool = True,
    join: bool = True,
    join_epochs: int | None = None,
) -> Prepared:
    """Build what is missing in ``data_dir`` and open it; one line to ``report`` for each artefact.

    Args:
        config: the run's settings.
        data_dir: the artefacts' folder.
        report: takes the lines.
        build: False opens only, for one of several processes.
        join: False leaves joined rows alone, whatever ``DataConfig.rows`` says: only training reads them.
        join_epochs: store the rows of so many epochs; None: as many as ``TrainConfig.steps`` read.

    Raises:
        UserError: a source is wrong, an artefact was built with other settings or from other inputs, or the disk is full; or
            something is missing that is not to be built.
    """
    data_dir = Path(data_dir)
    join = join and config.data.rows == "joined"
    wanted, states = stages_of(config, join=join), built_stages(data_dir)
    missing = [stage for stage in wanted if states.get(stage) != "built"]
    if missing and not build:
        raise UserError(
            f"{data_dir} has no {missing[0]}, and several processes do not build data together; "
            "run python -m retro_jax prepare once, with the same --config, --workdir and --set"
        )
    stages = _Stages(data_dir, wanted, report)
    _prepare_chunks(config, data_dir, stages)
    tokenizer = load_tokenizer(data_dir / "tokenizer")
    tables = open_chunk_tables(data_dir)
    ngrams = stages.run(
        lambda: build_ngrams(data_dir, tables["train"], workers=config.retrieval.workers, executor=config.retrieval.executor)
    )
    neighbours = stages.run(lambda: build_neighbours(config.retrieval, data_dir, tables, config.chunks))
    read = ("tokenizer", "tokens", "chunks", "ngrams", "neighbours")
    fingerprints = {name: open_artefact(data_dir / name, name).fingerprint for name in read}
    prepared = Prepared(tokenizer, tables, neighbours, ngrams, fingerprints)
    if not join:
        return prepared
    from retro_jax.data.join import build_joined  # and grain, which nothing else here needs

    return dataclasses.replace(prepared, joined=stages.run(lambda: build_joined(config, data_dir, prepared, epochs=join_epochs)))


def prepare_database(config: Config, data_dir: Path, report: Callable[[str], None] = print) -> Database:
    """As :func:`prepare`, of what a search needs alone: training chunks, embedder and index."""
    data_dir = Path(data_dir)
    stages = _Stages(data_dir, STAGES, report)
    _prepare_chunks(config, data_dir, stages)
    stages.run(lambda: build_database(config.retrieval, data_dir))
    return Database(data_dir)


def _prepare_chunks(config: Config, data_dir: Path, stages: _Stages) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    stages.run(lambda: build_tokenizer(config.tokenizer, config.corpus, data_dir))
    stages.run(lambda: build_tokens(config.corpus, data_dir))
    stages.run(lambda: build_chunks(config.chunks, data_dir))


def stages_of(config: Config, *, join: bool = True) -> tuple[str, ...]:
    """The stages that a config has, in order; ``join``: with joined rows, where ``DataConfig.rows`` says so."""
    asked = {"queries": not config.retrieval.symmetric, "joined": join and config.data.rows == "joined"}
    return tuple(stage for stage in MADE_FROM if asked.get(stage, True))


def built_stages(data_dir: Path) -> dict[str, str]:
    """For each stage "built", "unfinished" (a killed run left blocks) or "missing"; one on request only where it is begun."""
    states = {}
    for stage in MADE_FROM:
        path = Path(data_dir) / stage
        unfinished = path.with_name(stage + ".partial").exists()
        states[stage] = "built" if (path / MANIFEST).exists() else "unfinished" if unfinished else "missing"
    return {stage: state for stage, state in states.items() if stage in STAGES or state != "missing"}


def remove_stage(data_dir: Path, stage: str) -> list[str]:
    """Delete an artefact and all that are made from it; returns the names of those that were there.

    Raises:
        UserError: there is no such stage.
    """
    if stage not in MADE_FROM:
        raise UserError(f"--rebuild {stage} names no stage; choose one of {', '.join(MADE_FROM)}")
    states, made = built_stages(data_dir), {stage}
    for name, inputs in MADE_FROM.items():
        if made.intersection(inputs):
            made.add(name)
    removed = [name for name in MADE_FROM if name in made and states.get(name, "missing") != "missing"]
    for name in reversed(removed):
        remove_artefact(Path(data_dir) / name)
    return removed


def verify(data_dir: Path, report: Callable[[str], None] = print) -> None:
    """Check size and SHA-256 of every file of every artefact that is built.

    Raises:
        UserError: nothing is built, or a file is missing, truncated or corrupted.
    """
    built = [stage for stage, state in built_stages(data_dir).items() if state == "built"]
    if not built:
        raise UserError(f"{data_dir} holds no artefact to verify; build them first with `python -m retro_jax prepare`")
    for stage in built:
        artefact = open_artefact(Path(data_dir) / stage, stage, checksums="all")
        sizes = [facts["bytes"] for facts in artefact.manifest["files"].values()]
        report(f"{stage:<11} verified  {len(sizes)} files, {sum(sizes):,} bytes")


class _Stages:
    """Runs stages and reports the artefacts that each has built or found."""

    def __init__(self, data_dir: Path, wanted: Sequence[str], report: Callable[[str], None]) -> None:
        self._data_dir, self._wanted, self._report, self._reported = data_dir, wanted, report, set[str]()

    def run(self, stage: Callable[[], Made]) -> Made:
        before, began = built_stages(self._data_dir), time.time()
        result = stage()
        for name, state in built_stages(self._data_dir).items():
            if state != "built" or name in self._reported or name not in self._wanted:
                continue
            self._reported.add(name)
            artefact = open_artefact(self._data_dir / name, name, checksums="none")
            took, word = "", "skipped"
            if before.get(name) != "built":
                ended = (artefact.path / MANIFEST).stat().st_mtime
                took, began, word = f"{max(ended - began, 0.0):8.1f} s", ended, "built"
            self._report(f"{name:<11} {word:<8} {took:>10}  {_counts(artefact)}")
        return result


def _counts(artefact: Artefact) -> str:
    """The numbers of a summary in one line."""
    summary = artefact.summary
    parts = [f"{name} {value:,}" for name, value in summary.items() if type(value) is int]
    if "sources" in summary:
        parts.append(f"sources {len(summary['sources'])}")
        per_split = [_add(entry["splits"][split] for entry in summary["sources"]) for split in SPLITS]
    else:
        per_split = [summary["splits"][split] for split in SPLITS] if "splits" in summary else []
    names = [name for name, value in per_split[0].items() if isinstance(value, int)] if per_split else []
    parts += [f"{name} {' / '.join(f'{entry[name]:,}' for entry in per_split)}" for name in names]
    return ", ".join(parts) + (f" ({' / '.join(SPLITS)})" if names else "")


def _add(entries: object) -> Mapping[str, int]:
    total: dict[str, int] = {}
    for entry in entries:  # type: ignore[attr-defined]
        for name, value in entry.items():
            total[name] = total.get(name, 0) + value
    return total
