"""Whether what is built is what it should be: every file as its manifest says, every artefact made from those that stand beside
it, and a random share of the blocks equal to the same blocks computed anew, byte for byte."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from scipy.sparse import csr_matrix

from retro_jax.artefact import Artefact, open_artefact
from retro_jax.blocks import Block, block_arrays, run_blocks
from retro_jax.config import SPLITS, Config, RetrievalConfig, Split
from retro_jax.errors import UserError
from retro_jax.prepare import MADE_FROM, built_stages
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.embedder import load_embedder
from retro_jax.retrieval.embedding import Side, embed_block
from retro_jax.retrieval.index import one_process
from retro_jax.retrieval.ngrams import NGRAMS, build_shard, shards_of
from retro_jax.retrieval.search_stage import Searched, search_block
from retro_jax.retrieval.vectors import Vectors, open_vectors

SHOWN = 8


@dataclass(frozen=True)
class Difference:
    """Something that is not as it should be: in which stage, where in it, and what. ``split``, ``start`` and ``stop`` (chunks)
    are None where it is no row of chunks."""

    stage: str
    where: str
    what: str
    split: Split | None = None
    start: int | None = None
    stop: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}, {self.where}: {self.what}"


@dataclass(frozen=True)
class _Stage:
    """What is computed anew of a stage: tasks of ``compare``, which tells the rows (0 at a block's first) that differ as
    ``rows``, and the split, first chunk and end of each task's block."""

    name: str
    compare: Callable[..., Block]
    tasks: Sequence[tuple]
    covers: Sequence[tuple[Split, int, int]]
    one_process: bool = False


def check_blocks(
    config: Config, data_dir: Path, fraction: float, seed: int, report: Callable[[str], None] = print
) -> list[Difference]:
    """Check the checksums of all artefacts that are built, and a share of the blocks of look-up, vectors, queries and neighbours.

    Args:
        config: says how many chunks a block has, and who computes; what is computed is what the artefacts say of themselves.
        data_dir: holds the artefacts.
        fraction: of the blocks of each stage that is computed anew, at least one.
        seed: of the choice of blocks.
        report: takes a line for each stage and for each difference.

    Returns:
        What differs; a stage is not computed anew where it, or what it is made from, is not as its manifest says.

    Raises:
        UserError: nothing is built, ``fraction`` is not above 0 and at most 1, or a block cannot be computed.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g} is not above 0 and at most 1; 1 checks every block")
    data_dir, found, sound = Path(data_dir), list[Difference](), dict[str, Artefact]()

    def tell(differences: Sequence[Difference]) -> None:
        found.extend(differences)
        for difference in differences:
            report(str(difference))

    for stage, artefact, differences in _as_manifests_say(data_dir):
        if not differences and all(name in sound for name in artefact.manifest["inputs"] if name in MADE_FROM):
            sound[stage] = artefact
        if not differences:
            sizes = [facts["bytes"] for facts in artefact.manifest["files"].values()]
            report(f"{stage:<11} verified  {len(sizes)} files, {sum(sizes):,} bytes")
        tell(differences)
    rng = np.random.default_rng(seed)
    for name, plan in ((NGRAMS, _ngrams), ("vectors", _vectors), ("queries", _queries), ("neighbours", _neighbours)):
        if name in sound:
            wrong_form, blocks = plan(config.retrieval, data_dir, sound)
            tell(wrong_form)
            if blocks.tasks and not wrong_form:
                chosen = rng.choice(len(blocks.tasks), math.ceil(fraction * len(blocks.tasks)), replace=False, shuffle=False)
                differences = _computed_anew(config.retrieval, data_dir, blocks, np.sort(chosen).tolist())
                tell(differences)
                of = f"{len(chosen)} of {len(blocks.tasks)} blocks computed anew"
                report(f"{name:<11} checked   {of}, {len(differences)} differ")
    return found


def _as_manifests_say(data_dir: Path) -> Iterator[tuple[str, Artefact, list[Difference]]]:
    """Each stage that is built, with what its files and its inputs are not. (One that cannot be opened comes as it should be.)"""
    built = [stage for stage, state in built_stages(data_dir).items() if state == "built"]
    if not built:
        raise UserError(f"{data_dir} holds no artefact to check; build them first with `python -m retro_jax prepare`")
    fingerprints: dict[str, str] = {}
    for stage in built:
        try:
            artefact = open_artefact(data_dir / stage, stage, checksums="all")
        except UserError as error:
            yield stage, Artefact(data_dir / stage, {}), [Difference(stage, "its files", str(error))]
            continue
        fingerprints[stage] = artefact.fingerprint
        others = [
            Difference(stage, "its inputs", f"it was made from other {name} than those in {data_dir / name}")
            for name, fingerprint in artefact.manifest["inputs"].items()
            if fingerprints.get(name, fingerprint) != fingerprint
        ]
        yield stage, artefact, others


def _computed_anew(config: RetrievalConfig, data_dir: Path, stage: _Stage, chosen: Sequence[int]) -> list[Difference]:
    texts, executor = ChunkTexts.of(data_dir), config.executor
    tables = {split: texts.table(split) for split in SPLITS}

    def describe(block: tuple[Split, int, int]) -> str:
        return tables[block[0]].describe(*block[1:])

    covers = {stage.tasks[number]: stage.covers[number] for number in chosen}
    found = []
    # The machines of a cluster share the folder of the data, not that of temporary files.
    with tempfile.TemporaryDirectory(prefix="check.", dir=data_dir if executor.kind == "ray" else None) as folder:
        run_blocks(
            Path(folder),
            stage.compare,
            [stage.tasks[number] for number in chosen],
            workers=1 if stage.one_process and executor.kind == "local" else config.workers,
            description=f"check of {stage.name}",
            total=len(chosen),
            executor=executor,
            gpus=executor.gpus if stage.one_process else 0.0,
            describe=lambda task: describe(covers[task]),
        )
        for at, number in enumerate(chosen):
            rows = block_arrays(Path(folder), at)["rows"]
            if len(rows):
                split, start, stop = stage.covers[number]
                block = (split, start + int(rows[0]), start + int(rows[-1]) + 1)
                found.append(Difference(stage.name, describe(block), _in_words(rows + start, stop - start), *block))
    return found


def _in_words(chunks: np.ndarray, of: int) -> str:
    more = f" and {len(chunks) - SHOWN} more" if len(chunks) > SHOWN else ""
    named = ", ".join(map(str, chunks[:SHOWN].tolist()))
    return f"{len(chunks)} of the block's {of} rows differ from those computed anew: of chunks {named}{more}"


def _ngrams(config: RetrievalConfig, data_dir: Path, sound: dict[str, Artefact]) -> tuple[list[Difference], _Stage]:
    table = ChunkTexts.of(data_dir).table("train")
    shards = shards_of(table)
    tasks = [(sound[NGRAMS].path, data_dir, number, start, stop) for number, (start, stop) in enumerate(shards)]
    return [], _Stage(NGRAMS, _compare_shard, tasks, [("train", start, stop) for start, stop in shards])


def _compare_shard(path: Path, data_dir: Path, number: int, start: int, stop: int) -> Block:
    anew = build_shard(ChunkTexts.of(data_dir).table("train"), start, stop)
    stored = {name: _loaded(path / f"{number}.{name}.npy") for name in anew}
    same = all(_same(anew[name], stored[name]) for name in anew)
    return {"rows": np.arange(0 if same else stop - start)}


def _vectors(config: RetrievalConfig, data_dir: Path, sound: dict[str, Artefact]) -> tuple[list[Difference], _Stage]:
    return _embedded(config, data_dir, sound, "vectors", "found")


def _queries(config: RetrievalConfig, data_dir: Path, sound: dict[str, Artefact]) -> tuple[list[Difference], _Stage]:
    return _embedded(config, data_dir, sound, "queries", "searching")


def _embedded(
    config: RetrievalConfig, data_dir: Path, sound: dict[str, Artefact], kind: str, side: Side
) -> tuple[list[Difference], _Stage]:
    vectors, embedder = sound[kind], sound["embedder"]
    texts = _texts(data_dir, embedder)
    model = load_embedder(embedder.path)
    # Where what searches is embedded otherwise, only the train split is to be found.
    splits = [split for split in SPLITS if any(name.startswith(f"{split}.") for name in vectors.manifest["files"])]
    wrong = [
        Difference(kind, f"all {split} chunks", problem)
        for split in splits
        if (problem := _wrong_form(vectors, split, texts.table(split).num_chunks, model.dim, model.sparse))
    ]
    blocks = _blocks(config, texts, splits)
    tasks = [(embedder.path, embedder.fingerprint, texts, side, vectors.path, *block) for block in blocks]
    return wrong, _Stage(kind, _compare_vectors, tasks, blocks, model.one_process)


def _wrong_form(vectors: Artefact, split: Split, chunks: int, dim: int, sparse: bool) -> str | None:
    """Why rows cannot even be compared."""
    if not sparse:
        return _not_of(vectors.path / f"{split}.vectors.npy", np.float32, (chunks, dim))
    names = {"row_ends": np.int64, "data": np.float32, "columns": np.int32}
    ends = _loaded(vectors.path / f"{split}.row_ends.npy")
    entries = int(ends[-1]) if ends is not None and ends.ndim == 1 and len(ends) else 0
    for name, dtype in names.items():
        shape = (chunks,) if name == "row_ends" else (entries,)
        if problem := _not_of(vectors.path / f"{split}.{name}.npy", dtype, shape):
            return problem
    if ends is not None and (np.diff(ends, prepend=0) < 0).any():
        return f"{split}.row_ends.npy descends"
    return None


def _compare_vectors(
    embedder: Path, fingerprint: str, texts: ChunkTexts, side: Side, vectors: Path, split: Split, start: int, stop: int
) -> Block:
    anew = embed_block(embedder, fingerprint, texts, side, split, start, stop)
    stored = open_vectors(open_artefact(vectors, vectors.name), split).rows(start, stop)
    return {"rows": _rows_that_differ(_row_bytes(anew), _row_bytes(stored))}


def _neighbours(config: RetrievalConfig, data_dir: Path, sound: dict[str, Artefact]) -> tuple[list[Difference], _Stage]:
    texts, neighbours, index = _texts(data_dir, sound["embedder"]), sound["neighbours"], sound["index"]
    saved = neighbours.settings["saved"]
    wrong = [
        Difference("neighbours", f"all {split} chunks", problem)
        for split in SPLITS
        for name, dtype in (("ids", np.int64), ("distances", np.float32))
        if (problem := _not_of(neighbours.path / f"{split}.{name}.npy", dtype, (texts.table(split).num_chunks, saved)))
    ]
    vectors = sound["vectors"].path
    queries = sound["queries"].path if "queries" in neighbours.manifest["inputs"] else vectors
    searched = Searched(texts, index.path, vectors, queries, index.fingerprint)
    blocks = _blocks(config, texts, SPLITS)
    tasks = [(searched, saved, neighbours.path, *block) for block in blocks]
    return wrong, _Stage("neighbours", _compare_neighbours, tasks, blocks, one_process(index))


def _compare_neighbours(searched: Searched, saved: int, neighbours: Path, split: Split, start: int, stop: int) -> Block:
    anew = search_block(searched, saved, split, start, stop)
    stored = {name: np.load(neighbours / f"{split}.{name}.npy", mmap_mode="r")[start:stop] for name in anew}
    differing = [_rows_that_differ(_row_bytes(anew[name]), _row_bytes(stored[name])) for name in anew]
    return {"rows": np.unique(np.concatenate(differing))}


def _texts(data_dir: Path, embedder: Artefact) -> ChunkTexts:
    return ChunkTexts.of(data_dir, embedder.manifest["inputs"].get("context", "none"))


def _blocks(config: RetrievalConfig, texts: ChunkTexts, splits: Sequence[Split]) -> list[tuple[Split, int, int]]:
    size, counts = config.block_chunks, {split: texts.table(split).num_chunks for split in splits}
    return [(split, start, min(start + size, counts[split])) for split in splits for start in range(0, counts[split], size)]


def _row_bytes(vectors: Vectors | Block) -> list[bytes]:
    """The bytes of each row, of a sparse one its columns and values."""
    if isinstance(vectors, np.ndarray):
        return [row.tobytes() for row in vectors]
    if isinstance(vectors, csr_matrix):
        columns, data, sizes = vectors.indices, vectors.data, np.diff(vectors.indptr)
    else:
        if "vectors" in vectors:
            return _row_bytes(vectors["vectors"])
        columns, data, sizes = vectors["columns"], vectors["data"], vectors["row_sizes"]
    ends = np.cumsum(sizes)
    return [columns[end - n : end].tobytes() + data[end - n : end].tobytes() for end, n in zip(ends, sizes, strict=True)]


def _rows_that_differ(anew: list[bytes], stored: list[bytes]) -> np.ndarray:
    return np.array([row for row, (one, other) in enumerate(zip(anew, stored, strict=True)) if one != other], np.int64)


def _loaded(path: Path) -> np.ndarray | None:
    """The array, mapped; None where the file holds none."""
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError):
        return None


def _same(anew: np.ndarray, stored: np.ndarray | None) -> bool:
    return stored is not None and stored.dtype == anew.dtype and np.array_equal(anew, stored)


def _not_of(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> str | None:
    array = _loaded(path)
    if array is None:
        return f"{path.name} holds no array"
    if array.dtype != dtype or array.shape != shape:
        return f"{path.name} is {array.dtype} {array.shape} where {np.dtype(dtype)} {shape} should be"
    return None
