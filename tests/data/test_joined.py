"""Training rows joined with their neighbours: the gathered batches bit for bit, the same bytes however they were written."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from retro_jax.artefact import open_artefact
from retro_jax.config import ChunkConfig, Config, CorpusConfig, DataConfig, EvalConfig, ModelConfig, RetrievalConfig, TrainConfig
from retro_jax.data import join
from retro_jax.data.join import build_joined, row_record, space_needed
from retro_jax.data.joined_rows import JoinedRows
from retro_jax.data.pipeline import ALL, TrainingBatches, training_batches
from retro_jax.data.reader import open_reader
from retro_jax.data.training_rows import training_rows
from retro_jax.errors import UserError
from retro_jax.prepare import Prepared, verify
from tests.data.disk import write_neighbours, write_tables

REPOSITORY = Path(__file__).resolve().parents[2]
SAVED = 4


def config_of(
    *, L: int = 3, C: int = 4, K: int = 2, R: int = 8, steps: int = 12, weights=None, processes: int = 1, **data
) -> Config:
    return Config(
        corpus=CorpusConfig(sources=("a", "b"), weights=weights),
        chunks=ChunkConfig(chunk_len=C, num_neighbours=K, retrieved_len=R),
        retrieval=RetrievalConfig(workers=processes),
        data=DataConfig(**{"seq_len": L * C, "batch_size": 4, "seed": 7, "rows": "joined", **data}),
        model=ModelConfig(retro=None),
        training=TrainConfig(steps=steps),
        evaluation=EvalConfig(window=L * C, stride=L * C),
    )


def write_data(folder: Path, config: Config, lengths=((5, 17, 40, 3, 8), (26, 31, 12)), vocab: int = 90) -> Prepared:
    """Two sources of documents of these lengths, with random neighbours of which some are missing."""
    rng, C = np.random.default_rng(0), config.chunks.chunk_len
    documents = [rng.integers(1, min(vocab, 90), n).tolist() for of_source in lengths for n in of_source]
    tables = write_tables(folder, {"train": documents}, C, sources={"train": [len(of_source) for of_source in lengths]})
    ids = rng.integers(-1, len(tables["train"]), (len(tables["train"]), SAVED))
    neighbours = write_neighbours(folder, {"train": ids}, tables, config.chunks.retrieved_len)
    fingerprints = {name: open_artefact(folder / name, name).fingerprint for name in ("tokens", "chunks", "neighbours")}
    return Prepared(SimpleNamespace(vocab_size=vocab), tables, neighbours, None, fingerprints)


def batches_of(config: Config, data: Prepared, joined: JoinedRows | None, *, rows_here=ALL, gpt=False) -> TrainingBatches:
    weights, reader = config.corpus.weights, open_reader(config, data, "train", neighbours=not gpt)
    rows = training_rows(reader.queries, config.data.seq_len, weights=weights)
    return training_batches(rows, reader, config.data, weights=weights, rows_here=rows_here, joined=joined)


def take(batches: TrainingBatches, count: int) -> list:
    taken = list(itertools.islice(batches, count))
    assert len(taken) == count
    return taken


def assert_equal(left: list, right: list) -> None:
    for (a, a_ids), (b, b_ids) in zip(left, right, strict=True):
        np.testing.assert_array_equal(a_ids, b_ids)
        assert a_ids.dtype == b_ids.dtype and a.first_chunk_len is b.first_chunk_len is None
        for x, y, name in zip(a[:-1], b[:-1], a._fields[:-1], strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)
            assert (x.dtype, x.shape, x.flags.writeable) == (y.dtype, y.shape, y.flags.writeable), name


@pytest.fixture
def config() -> Config:
    return config_of()


@pytest.fixture
def data(tmp_path: Path, config: Config) -> Prepared:
    return write_data(tmp_path, config)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    """Five rows a shard, so that the batches of four cross their ends."""
    monkeypatch.setattr(join, "SHARD_BYTES", 5 * row_record(config, 90).dtype.itemsize)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("weights", [None, (0.3, 0.7)])
@pytest.mark.parametrize("filters", [{}, {"neighbour_sources": (1,)}, {"max_overlap": 0.3}])
def test_joined_batches_are_the_gathered_ones(weights, filters, tmp_path: Path) -> None:
    config = config_of(weights=weights, **filters)
    data = write_data(tmp_path, config)
    joined = build_joined(config, tmp_path, data)
    whole = take(batches_of(config, data, None), 12)
    assert_equal(take(batches_of(config, data, joined), 12), whole)
    assert sum(batch.neighbour_mask.any() for batch, _ in whole) == 12 and len(list((tmp_path / "joined").glob("rows-*"))) == 10
    for here in (slice(0, 1), slice(1, 4)):
        gathered, stored = (take(batches_of(config, data, form, rows_here=here), 5) for form in (None, joined))
        assert_equal(stored, gathered)
        np.testing.assert_array_equal(stored[4][1], whole[4][1][here])
    assert_equal(take(batches_of(config, data, joined, gpt=True), 5), take(batches_of(config, data, None, gpt=True), 5))


@pytest.mark.usefixtures("small_shards")
def test_a_batch_size_that_divides_nothing_and_the_end(tmp_path: Path, config: Config, data: Prepared) -> None:
    joined = build_joined(config, tmp_path, data)
    other = config_of(batch_size=7)
    batches = batches_of(other, data, joined)
    assert_equal(take(batches, 6), take(batches_of(other, data, None), 6))
    with pytest.raises(UserError, match=r"rows end after batch 6; store more with `.*--rebuild joined`, or set DataConfig.rows"):
        next(batches)


@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    lengths=st.tuples(*[st.lists(st.integers(1, 40), min_size=1, max_size=6)] * 2),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, SAVED), st.integers(1, 3)),
    order=st.tuples(st.integers(0, 9), st.sampled_from([None, (0.5, 0.5), (0.9, 0.1)]), st.integers(1, 5), st.integers(0, 3)),
    vocab=st.sampled_from([90, 70_000]),
)
def test_any_corpus_shape_and_order(lengths, shape, order, vocab, tmp_path_factory: pytest.TempPathFactory) -> None:
    (L, C, K, continuations), (seed, weights, batch_size, skipped) = shape, order
    folder = tmp_path_factory.mktemp("any")
    config = config_of(L=L, C=C, K=max(K, 1), R=continuations * C, weights=weights, seed=seed, batch_size=batch_size, steps=6)
    data = write_data(folder, config, lengths, vocab)
    joined = build_joined(config, folder, data)
    gathered, stored = (batches_of(config, data, form, gpt=K == 0) for form in (None, joined))
    for batches in (gathered, stored):
        batches.set_state({**batches.get_state(), "next_batch": skipped})
    assert_equal(take(stored, 6 - skipped), take(gathered, 6 - skipped))
    shutil.rmtree(folder)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_over_from_one_form_to_the_other_and_back(workers: int, tmp_path: Path, data: Prepared) -> None:
    config = config_of(workers=workers)
    joined = build_joined(config, tmp_path, data)
    whole, taken, state = take(batches_of(config_of(), data, None), 9), [], None
    for form in (joined, None, joined) if workers == 0 else (joined,):
        batches = batches_of(config, data, form)
        try:
            batches.set_state(state or batches.get_state())
            taken += take(batches, 3)
            state = batches.get_state()
        finally:
            batches.close()
    assert_equal(taken, whole[: len(taken)])
    assert state == {**batches_of(config, data, None).get_state(), "next_batch": len(taken)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "joined").iterdir())}


MANY = (tuple(range(20, 60)) * 30, (35,) * 200)
# Its worker processes run the first lines too: so slow are disks that the kill comes in time.
WRITER = """
import os, sys, time
from pathlib import Path
from retro_jax.data import join
from tests.data.test_joined import MANY, config_of, write_data
fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.1), fsync(file))
if __name__ == "__main__":
    join.SHARD_BYTES = int(sys.argv[2])
    config, folder = config_of(steps=500, processes=2), Path(sys.argv[1])
    join.build_joined(config, folder, write_data(folder, config, MANY))
"""


def test_killed_and_written_again_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two worker processes are at it when it is killed with SIGKILL; another run finishes their work alone."""
    config, folders = config_of(steps=500), [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    shard = 125 * row_record(config, 90).dtype.itemsize
    (tmp_path / "writer.py").write_text(WRITER)
    command = [sys.executable, str(tmp_path / "writer.py"), str(folders[1]), str(shard)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE)
    ends, partial = time.monotonic() + 60, folders[1] / "joined.partial"
    while len(list(partial.glob("blocks/*.done"))) < 4 and process.poll() is None:
        assert time.monotonic() < ends
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = [f"rows-{int(path.stem):05d}-of-00016.array_record" for path in partial.glob("blocks/*.done")]
    written = {name: (partial / name).stat().st_mtime_ns for name in done}
    monkeypatch.setattr(join, "SHARD_BYTES", shard)
    for folder in folders:
        build_joined(config, folder, write_data(folder, config, MANY))
    assert 4 <= len(done) < 16 and written == {name: (folders[1] / "joined" / name).stat().st_mtime_ns for name in done}
    assert contents(folders[0]) == contents(folders[1]) and len(contents(folders[0])) == 17


def test_what_it_takes_is_told_and_too_little_space_is_refused(
    tmp_path: Path, config: Config, data: Prepared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = row_record(config, 90)
    L, C, K, R = 3, 4, 2, 8
    assert record.dtype.itemsize == 2 + 8 + 4 * L + 4 * L + 2 * L * (C + 1) + 4 * L * K + 2 * L * K * R
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=space_needed(48, record) - 1))
    with pytest.raises(UserError, match=r"48 joined training rows take up to 0 MiB, but 0 MiB are free in .*free some space"):
        build_joined(config, tmp_path, data)
    assert not list(tmp_path.glob("joined*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=space_needed(48, record)))
    capsys.readouterr()
    build_joined(config, tmp_path, data)
    assert f"48 joined training rows of {record.dtype.itemsize:,} bytes take at most" in capsys.readouterr().err
    assert sum(path.stat().st_size for path in (tmp_path / "joined").glob("rows-*")) <= space_needed(48, record)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    build_joined(config, tmp_path, data)  # it stands there
    assert capsys.readouterr().err == ""


def test_random_bytes_take_no_more_than_is_told(tmp_path: Path) -> None:
    """Tokens that zstd cannot shrink, in chunks without padding."""
    config = config_of(L=16, C=64, R=128, steps=20)
    rng, chunks = np.random.default_rng(1), 4096
    tables = write_tables(tmp_path, {"train": [rng.integers(0, 2**16, chunks * 64).tolist()]}, 64, sources={"train": [1, 0]})
    neighbours = write_neighbours(tmp_path, {"train": rng.integers(0, chunks - 1, (chunks, SAVED))}, tables, 128)
    fingerprints = {name: open_artefact(tmp_path / name, name).fingerprint for name in ("chunks", "neighbours")}
    build_joined(config, tmp_path, Prepared(SimpleNamespace(vocab_size=65_000), tables, neighbours, None, fingerprints))
    taken = sum(path.stat().st_size for path in (tmp_path / "joined").glob("rows-*"))
    record = row_record(config, 65_000)
    assert 0.9 * 80 * record.dtype.itemsize < taken <= space_needed(80, record)


def test_a_disk_that_is_full_after_all(tmp_path: Path) -> None:
    """A write that fails for real: no file may grow beyond 32 KiB."""
    config = config_of(steps=500)
    data, limits = write_data(tmp_path, config, MANY), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            build_joined(config, tmp_path, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("joined.partial/*.array_record*"))
    assert len(build_joined(config, tmp_path, data)) == 2000


def test_joined_rows_of_other_settings_are_refused(tmp_path: Path, config: Config, data: Prepared) -> None:
    build_joined(config, tmp_path, data)
    for change, told in (
        ({"seed": 8}, "joined was built with setting seed=7, now seed=8 is asked for; .*--rebuild joined"),
        ({"L": 6}, "setting seq_len=12, now seq_len=24"),
        ({"K": 3}, "setting num_neighbours=2, now num_neighbours=3"),
        ({"R": 4}, "setting retrieved_len=8, now retrieved_len=4"),
        ({"max_overlap": 0.5}, "setting max_overlap=None, now max_overlap=0.5"),
        ({"neighbour_sources": (0,)}, r"setting neighbour_sources=None, now neighbour_sources=\[0\]"),
        ({"weights": (0.5, 0.5)}, r"setting weights=None, now weights=\[0.5, 0.5\]"),
        ({"steps": 13}, r"holds 48 training rows, and 52 are asked for .*--rebuild joined`, or set DataConfig.rows='gathered'"),
    ):
        with pytest.raises(UserError, match=told):
            build_joined(config_of(**change), tmp_path, data)
    assert len(build_joined(config_of(steps=3, batch_size=2, workers=1, prefetch=1), tmp_path, data)) == 48
    other = Prepared(data.tokenizer, data.tables, data.neighbours, None, {**data.fingerprints, "neighbours": "another"})
    with pytest.raises(UserError, match="joined was built with input neighbours=.*, now neighbours='another'"):
        build_joined(config, tmp_path, other)


def test_epochs(tmp_path: Path, config: Config, data: Prepared) -> None:
    rows = training_rows(data.tables["train"], 12, weights=None)
    assert len(build_joined(config, tmp_path, data, epochs=2)) == 2 * len(rows)
    with pytest.raises(UserError, match=f"holds {2 * len(rows)} training rows, and {3 * len(rows)} are asked for"):
        build_joined(config, tmp_path, data, epochs=3)


def test_damage_is_told(tmp_path: Path, config: Config, data: Prepared) -> None:
    build_joined(config, tmp_path, data)
    shard = next((tmp_path / "joined").glob("rows-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(UserError, match=r"rows-00000-of-00001.array_record cannot be read \(.*hash mismatch.*--rebuild joined"):
        take(batches_of(config, data, JoinedRows(tmp_path / "joined")), 12)
    with pytest.raises(UserError, match=r"rows-00000-of-00001.array_record is corrupted"):
        verify(tmp_path, report=lambda line: None)
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="truncated"):
        JoinedRows(tmp_path / "joined")
    shard.write_bytes(whole)
    with pytest.raises(UserError, match="holds row .* where training reads row .*; rebuild it"):
        next(batches_of(config_of(seed=8), data, JoinedRows(tmp_path / "joined")))


def test_a_record_of_another_version_or_length(config: Config, data: Prepared) -> None:
    record, reader = row_record(config, 90), open_reader(config, data, "train", neighbours=True)
    ids = training_rows(data.tables["train"], 12, weights=None).chunk_ids([0, 1])
    one, two = record.encode(np.array([0, 1]), reader.look_up(ids))
    assert record.decode([one, two], neighbours=True)[0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="not all records have version 1"):
        record.decode([one, b"\x02" + two[1:]], neighbours=True)
    with pytest.raises(ValueError, match=f"not all records have {len(one)} bytes"):
        record.decode([one, two + b"\x00"], neighbours=True)
