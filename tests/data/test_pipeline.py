"""Order, mixing, sharding and continuation of the training pipeline."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from retro_jax.config import ChunkConfig, DataConfig
from retro_jax.data.pipeline import ALL, row_numbers, training_batches
from retro_jax.data.reader import RowReader
from retro_jax.data.training_rows import training_rows
from retro_jax.errors import UserError
from tests.data.disk import write_neighbours, write_tables
from tests.data.memory import MemoryChunks, MemoryNeighbours

L, C = 3, 4


def make_reader(lengths=(5, 17, 40, 3, 8, 26, 31, 12), sources=(5, 3)):
    rng = np.random.default_rng(0)
    table = MemoryChunks([rng.integers(1, 90, n).tolist() for n in lengths], C, source_documents=list(sources))
    neighbours = MemoryNeighbours(rng.integers(-1, table.num_chunks, (table.num_chunks, 4)))
    return RowReader(
        queries=table, database=table, neighbours=neighbours, chunks=ChunkConfig(chunk_len=C, num_neighbours=2, retrieved_len=8)
    )


def make_batches(weights=None, rows_here=ALL, reader=None, **settings):
    reader = reader or make_reader()
    config = DataConfig(**{"seq_len": L * C, "batch_size": 4, "seed": 7, **settings})
    rows = training_rows(reader.queries, config.seq_len, weights=weights)
    return training_batches(rows, reader, config, weights=weights, rows_here=rows_here)


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    assert len(taken) == count
    return taken


def assert_equal(left, right):
    for (a, a_ids), (b, b_ids) in zip(left, right, strict=True):
        np.testing.assert_array_equal(a_ids, b_ids)
        for x, y, name in zip(a, b, a._fields, strict=True):
            if name != "first_chunk_len":
                np.testing.assert_array_equal(x, y, err_msg=name)
                assert x.dtype == y.dtype, name


def test_a_batch_is_what_reading_its_chunks_gives():
    reader = make_reader()
    for batch, ids in take(make_batches(reader=reader), 3):
        assert ids.shape == (4, L) and batch.tokens.shape == (4, L * C) and batch.neighbours.shape == (4, L, 2, 8)
        assert_equal([(batch, ids)], [(reader.read(ids), ids)])


@pytest.mark.parametrize("weights", [None, (0.25, 0.75)])
def test_rows_do_not_depend_on_the_batch_size(weights):
    """One row a batch, too."""
    ids = [np.concatenate([i for _, i in take(make_batches(weights, batch_size=b), 12 // b)]) for b in (1, 3, 4)]
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[0], ids[2])


def test_every_row_once_an_epoch_reshuffled():
    rows = training_rows(make_reader().queries, L * C, weights=None)
    numbers = row_numbers(rows, 3, None)
    epochs = [[int(numbers[e * len(rows) + i]) for i in range(len(rows))] for e in range(3)]
    assert all(sorted(epoch) == list(range(len(rows))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_alone():
    assert_equal(take(make_batches(), 6), take(make_batches(), 6))
    ids, others = (np.concatenate([i for _, i in take(make_batches(seed=seed), 4)]) for seed in (7, 8))
    assert not np.array_equal(ids, others)


def test_weights_mix_sources_exactly():
    rows = training_rows(make_reader().queries, L * C, weights=(0.25, 0.75))
    numbers = row_numbers(rows, 3, (0.25, 0.75))
    drawn = np.array([int(numbers[i]) for i in range(400)])
    assert (drawn < rows.source_rows[1]).sum() == 100
    first = drawn[drawn < rows.source_rows[1]][: rows.source_rows[1]]
    assert sorted(first) == list(range(rows.source_rows[1])), "a source gives every row once before it repeats one"


def test_processes_share_the_whole_batch():
    whole = take(make_batches(), 5)
    processes = [take(make_batches(rows_here=rows), 5) for rows in (slice(0, 1), slice(1, 4))]
    for step, (batch, ids) in enumerate(whole):
        parts = [processes[0][step], processes[1][step]]
        np.testing.assert_array_equal(ids, np.concatenate([p[1] for p in parts]))
        np.testing.assert_array_equal(batch.tokens, np.concatenate([p[0].tokens for p in parts]))
        np.testing.assert_array_equal(batch.neighbours, np.concatenate([p[0].neighbours for p in parts]))


def test_a_gpt_reads_identical_rows_without_neighbours():
    reader = make_reader()
    plain = RowReader(queries=reader.queries, database=reader.database, neighbours=None, chunks=reader.chunks)
    for (batch, ids), (bare, bare_ids) in zip(
        take(make_batches(reader=reader), 3), take(make_batches(reader=plain), 3), strict=True
    ):
        np.testing.assert_array_equal(ids, bare_ids)
        np.testing.assert_array_equal(batch.targets, bare.targets)
        assert bare.neighbours.shape == (4, L, 0, 8)


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_stored_state_continues_bit_equal(taken):
    whole = take(make_batches(), taken + 5)
    batches = make_batches()
    take(batches, taken)
    state = batches.get_state()
    take(batches, 3)
    batches.set_state(state)
    assert_equal(take(batches, 5), whole[taken:])
    fresh = make_batches()
    fresh.set_state(state)
    assert_equal(take(fresh, 5), whole[taken:])


def test_the_state_of_other_rows_is_refused():
    with pytest.raises(UserError, match="batches with batch_size=4, now batch_size=8"):
        make_batches(batch_size=8).set_state(make_batches().get_state())


def test_checkpointed_with_orbax(tmp_path):
    batches = make_batches()
    take(batches, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        expected = take(batches, 2)
        manager.wait_until_finished()
        restored = manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(make_batches())))["data"]
    assert_equal(take(restored, 2), expected)


@pytest.fixture(scope="module")
def disk_reader(tmp_path_factory):
    """The reader of :func:`make_reader`, with tables on disk, as worker processes get them."""
    memory, folder = make_reader(), tmp_path_factory.mktemp("tables")
    documents = [document.tolist() for document in memory.queries.documents]
    tables = write_tables(folder, {"train": documents}, C, sources={"train": [5, 3]})
    neighbours = write_neighbours(folder, {"train": memory.neighbours.ids_NS}, tables, 8)["train"]
    return RowReader(queries=tables["train"], database=tables["train"], neighbours=neighbours, chunks=memory.chunks)


def test_tables_on_disk_give_the_same_batches(disk_reader):
    assert_equal(take(make_batches(reader=disk_reader), 5), take(make_batches(), 5))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_batches_and_continue_each_others_states(disk_reader, workers):
    whole = take(make_batches(), 7)
    batches = make_batches(reader=disk_reader, workers=workers)
    try:
        assert_equal(take(batches, 3), whole[:3])
        state = batches.get_state()
    finally:
        batches.close()
    assert state == {**make_batches().get_state(), "next_batch": 3}
    batches = make_batches(reader=disk_reader, workers=3 - workers)
    try:
        batches.set_state(state)
        assert_equal(take(batches, 4), whole[3:])
    finally:
        batches.close()


KILLED = """
import sys
from pathlib import Path
from retro_jax.config import DataConfig
from tests.data.disk import write_tables
from tests.data.disk import write_neighbours, write_tables
from tests.data.memory import memory_reader
from tests.data.test_pipeline import make_batches
import multiprocessing
if __name__ == "__main__":
    tables = write_tables(Path(sys.argv[1]), {"train": [list(range(1, 60))] * 9}, 4)
    batches = make_batches(reader=memory_reader(tables["train"]), workers=2)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.read()
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path / "data"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(_runs(pid) for pid in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive their killed parent"
        time.sleep(0.1)


def _runs(pid):
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
