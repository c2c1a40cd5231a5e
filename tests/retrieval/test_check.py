"""Every corruption that is planted in what is built is found, and told where it is; what is as it should be raises no alarm."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from retro_jax.artefact import MANIFEST
from retro_jax.config import SPLITS, ChunkConfig, Config, RetrievalConfig
from retro_jax.corpus.chunk_table import open_chunk_tables
from retro_jax.errors import UserError
from retro_jax.retrieval.check import Difference, check_blocks
from retro_jax.retrieval.neighbours import build_neighbours
from retro_jax.retrieval.ngrams import build_ngrams
from tests.retrieval.conftest import build_corpus

TFIDF = RetrievalConfig(saved=6, features=2**12, block_chunks=32, workers=1)
LSA = replace(TFIDF, embedder="lsa", lsa_dim=16)
CHUNKS = ChunkConfig(chunk_len=16, num_neighbours=2, retrieved_len=32)
TRIALS = [
    pytest.param(range(10), id="10"),
    *(pytest.param(range(first, first + 10), id=f"{first}-{first + 9}", marks=pytest.mark.slow) for first in range(10, 100, 10)),
]


class Built(NamedTuple):
    """A folder of data, one of the same corpus without some of its documents' words, and the config of both."""

    data: Path
    other: Path
    config: Config


@pytest.fixture(scope="module", params=[TFIDF, LSA], ids=["tfidf", "lsa"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folders = [build_corpus(tmp_path_factory.mktemp("check") / "data", seed=seed, count=30) for seed in (0, 1)]
    for folder in folders:
        tables = open_chunk_tables(folder)
        build_ngrams(folder, tables["train"])
        build_neighbours(request.param, folder, tables, CHUNKS)
    return Built(*folders, Config(retrieval=replace(request.param, saved=20)))  # what is checked says what was saved


def check(config: Config, data: Path, fraction: float = 1.0, seed: int = 0) -> list[Difference]:
    lines: list[str] = []
    found = check_blocks(config, data, fraction, seed, lines.append)
    assert [line for line in lines if " verified " not in line and " checked " not in line] == list(map(str, found))
    return found


def test_what_is_as_it_should_be_raises_no_alarm(built: Built) -> None:
    lines: list[str] = []
    assert check_blocks(built.config, built.data, 1.0, 0, lines.append) == []
    counts = {split: table.num_chunks for split, table in open_chunk_tables(built.data).items()}
    blocks = sum(-(-count // 32) for count in counts.values())
    assert f"vectors     checked   {blocks} of {blocks} blocks computed anew, 0 differ" in lines
    assert f"neighbours  checked   {blocks} of {blocks} blocks computed anew, 0 differ" in lines
    assert "ngrams      checked   1 of 1 blocks computed anew, 0 differ" in lines
    assert sum(" verified " in line for line in lines) == 8


def test_a_share_is_checked(built: Built) -> None:
    lines: list[str] = []
    assert check_blocks(built.config, built.data, 0.3, 1, lines.append) == []
    (line,) = (line for line in lines if line.startswith("vectors     checked"))
    chosen, blocks = (int(line.split()[word]) for word in (2, 4))
    assert chosen == -(-blocks * 3 // 10) < blocks


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def zero(path: Path, rng: random.Random) -> None:
    """A run of bytes, at least one of which was none."""
    data = bytearray(path.read_bytes())
    first = rng.choice([place for place, byte in enumerate(data) if byte])
    last = min(first + rng.randrange(1, 4096), len(data))
    data[first:last] = bytes(last - first)
    path.write_bytes(data)


Harm = Callable[[Path, random.Random], None]


def plant_in_a_file(data: Path, harm: Harm, rng: random.Random) -> str:
    """Harm a file of any artefact, manifests too; returns its stage."""
    files = sorted(path for path in data.glob("*/*") if path.is_file() and any(path.read_bytes()))
    path = rng.choice(files)
    harm(path, rng)
    return path.parent.name


def plant_rows(data: Path, other: Path, stale: bool, rng: random.Random) -> tuple[str, str, list[int]]:
    """Two rows swapped, or one taken from another build, and a manifest that agrees: stage, split, chunks."""
    stage, split = rng.choice(["vectors", "neighbours"]), rng.choice(SPLITS)
    names = [name for name in ("ids", "distances", "vectors", "data") if (data / stage / f"{split}.{name}.npy").exists()]
    if names == ["data"]:
        return stage, split, [_sparse_row(data / stage, split, rng)]
    arrays = {name: np.load(data / stage / f"{split}.{name}.npy") for name in names}
    others = {name: np.load(other / stage / f"{split}.{name}.npy") for name in names}

    def row(source: dict[str, np.ndarray], chunk: int) -> bytes:
        return b"".join(array[chunk].tobytes() for array in source.values())

    while True:
        one, two = (rng.randrange(len(arrays[names[0]])) for _ in range(2))
        if stale and two < len(others[names[0]]) and row(arrays, one) != row(others, two):
            changes = {name: {one: others[name][two]} for name in names}
        elif not stale and row(arrays, one) != row(arrays, two):
            changes = {name: {one: arrays[name][two].copy(), two: arrays[name][one].copy()} for name in names}
        else:
            continue
        for name in names:
            for chunk, value in changes[name].items():
                arrays[name][chunk] = value
            np.save(data / stage / f"{split}.{name}.npy", arrays[name])
        rewrite_manifest(data / stage)
        return stage, split, sorted(changes[names[0]])


def _sparse_row(stage: Path, split: str, rng: random.Random) -> int:
    """Two values of a row of a sparse matrix that differ are swapped."""
    values, ends = np.load(stage / f"{split}.data.npy"), np.load(stage / f"{split}.row_ends.npy")
    starts = ends - np.diff(ends, prepend=0)
    row = rng.choice([r for r in range(len(ends)) if len(set(values[starts[r] : ends[r]])) > 1])
    places = np.arange(starts[row], ends[row])
    one, two = places[values[places].argmin()], places[values[places].argmax()]
    values[[one, two]] = values[[two, one]]
    np.save(stage / f"{split}.data.npy", values)
    rewrite_manifest(stage)
    return int(row)


def rewrite_manifest(stage: Path) -> None:
    """Checksums and digest of the files as they are now; the fingerprint stays, so that what was made from it still fits."""
    manifest = json.loads((stage / MANIFEST).read_text())
    for name, facts in manifest["files"].items():
        data = (stage / name).read_bytes()
        facts |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del manifest["digest"]
    manifest["digest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    (stage / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


@pytest.mark.parametrize("trials", TRIALS)
def test_every_planted_corruption_is_found(trials: range, built: Built, tmp_path: Path) -> None:
    for trial in trials:
        rng, data = random.Random(trial), shutil.copytree(built.data, tmp_path / str(trial))
        if trial % 5 < 3:
            stage = plant_in_a_file(data, (flip, truncate, zero)[trial % 5], rng)
            found = check(built.config, data, 0.01)
            assert [difference.stage for difference in found] == [stage] and str(data / stage) in found[0].what, trial
        else:
            stage, split, chunks = plant_rows(data, built.other, trial % 5 == 4, rng)
            own = [d for d in check(built.config, data) if d.stage == stage]
            assert {d.split for d in own} == {split}, trial
            assert all(any(d.start <= chunk < d.stop for d in own) for chunk in chunks), trial  # type: ignore[operator]
            table = open_chunk_tables(data)[split]  # type: ignore[index]
            for chunk in chunks:
                (told,) = (d for d in own if d.start <= chunk < d.stop)  # type: ignore[operator]
                assert f"{split} chunks {told.start} to" in str(told) and f"{chunk}" in told.what
                assert f"documents {table.document_N[told.start]} to" in told.where and "data.jsonl" in told.where
        shutil.rmtree(data)


def test_artefacts_of_two_builds_are_told_apart(built: Built, tmp_path: Path) -> None:
    """Whole in themselves, but not made from one another."""
    data = shutil.copytree(built.data, tmp_path / "data")
    shutil.rmtree(data / "vectors")
    shutil.copytree(built.other / "vectors", data / "vectors")
    found = {f"{difference.stage} {difference.what.split(' than')[0]}" for difference in check(built.config, data)}
    assert {"vectors it was made from other embedder", "index it was made from other vectors"} <= found


def test_rows_of_another_form_are_told(built: Built, tmp_path: Path) -> None:
    data = shutil.copytree(built.data, tmp_path / "data")
    ids = np.load(data / "neighbours" / "test.ids.npy")
    np.save(data / "neighbours" / "test.ids.npy", ids[:-1])
    rewrite_manifest(data / "neighbours")
    (found,) = check(built.config, data)
    assert found.stage == "neighbours" and f"test.ids.npy is int64 ({len(ids) - 1}, 6) where int64 ({len(ids)}, 6)" in found.what


def test_a_shard_of_the_look_up_is_computed_anew(built: Built, tmp_path: Path) -> None:
    data = shutil.copytree(built.data, tmp_path / "data")
    order = np.load(data / "ngrams" / "0.order.npy")
    np.save(data / "ngrams" / "0.order.npy", order[::-1].copy())
    rewrite_manifest(data / "ngrams")
    (found,) = check(built.config, data)
    assert (found.stage, found.split, found.start) == ("ngrams", "train", 0)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_a_fraction_is_a_share(fraction: float, built: Built) -> None:
    with pytest.raises(UserError, match=r"--fraction .* is not above 0 and at most 1"):
        check(built.config, built.data, fraction)


def test_nothing_built_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no artefact to check"):
        check(Config(), tmp_path)
