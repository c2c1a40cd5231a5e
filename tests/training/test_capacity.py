"""Places for the chunks whose neighbours are read: how many there are, whether they are enough, and what a run says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import grain
import numpy as np
import pytest

from retro_jax.config import MeshConfig, TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.data.pipeline import row_numbers
from retro_jax.data.training_rows import TrainingRows
from retro_jax.errors import UserError
from retro_jax.training import capacity as capacity_module
from retro_jax.training.capacity import automatic_capacity, num_places, refuse_too_full
from retro_jax.training.loop import Job, fit
from retro_jax.training.metrics import METRICS, read_lines
from tests.training.tiny import C, L, random_batch, tiny_config


class Lengths:
    """A chunk table in which documents have one to four chunks, the last one cut."""

    chunk_len = C

    def __init__(self, chunks: int) -> None:
        random, remaining = np.random.default_rng(0), list[int]()
        while len(remaining) < chunks:
            tokens = random.integers(1, 4 * C)
            remaining += range(tokens, 0, -C)
        self.remaining_N = np.array(remaining[:chunks])


@pytest.mark.parametrize(
    ("capacity", "places"), [(1.0, None), ("auto", None), (0.5, 64), (0.51, 72), (0.001, 8), (0.99, None), (0.9, 120)]
)
def test_places_come_in_eights(capacity: float, places: int | None) -> None:
    assert num_places(TrainConfig(neighbour_capacity=capacity), 8, 16) == places


@pytest.mark.parametrize("mesh", [{}, {"data": 2}, {"sequence": 2}])
def test_the_automatic_capacity_is_enough_and_not_much_more(mesh: dict) -> None:
    """Over two epochs of rows, in the order of training."""
    rows, length = 32, 16
    config = tiny_config(MeshConfig(**mesh), neighbour_capacity="auto", accumulate=2)
    data = dataclasses.replace(config.data, batch_size=rows, seq_len=length * C)
    config = dataclasses.replace(config, data=data)
    table = Lengths(40_000)
    training = TrainingRows(source_chunks=np.array([0, 40_000]), chunks_per_row=length)
    capacity = automatic_capacity(config, training, table)  # type: ignore[arg-type]
    order = row_numbers(training, config.data.seed, None)
    numbers = np.array([order[i] for i in range(2 * len(training) // rows * rows)]).reshape(-1, rows)
    read = table.remaining_N[training.chunk_ids(numbers.reshape(-1))] >= C
    devices, parts = config.mesh.data, config.mesh.sequence
    fullest = read.reshape(-1, devices, rows // devices // 2, 2, parts, length // parts).sum(axis=(2, 5)).max()
    share = fullest / (rows // devices // 2 * length // parts)
    assert 0.5 < share <= capacity < share + 0.15


def test_a_model_that_reads_across_documents_has_places_for_all() -> None:
    config = tiny_config(neighbour_capacity="auto")
    assert config.model.retro is not None
    retro = dataclasses.replace(config.model.retro, cross_document=True)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, retro=retro))
    rows = TrainingRows(source_chunks=np.array([0, 400]), chunks_per_row=L)
    assert automatic_capacity(config, rows, Lengths(400)) == 1.0  # type: ignore[arg-type]


def test_a_batch_that_is_too_full_is_refused_with_what_is_enough() -> None:
    """16 rows of 2 chunks, of which every first one is read, and of the last 4 rows every second one too."""
    batch = random_batch(0, rows=16)[0]
    segments = np.ones_like(batch.segments)
    segments[:12, -1] = 0
    batch = batch._replace(segments=segments, neighbour_mask=np.ones_like(batch.neighbour_mask))

    def config(capacity: float, **mesh: int):
        base = tiny_config(MeshConfig(**mesh), neighbour_capacity=capacity)
        return dataclasses.replace(base, data=dataclasses.replace(base.data, batch_size=16))

    refuse_too_full(config(0.7), batch, "step 1")
    refuse_too_full(config(1.0, data=2), batch, "step 1")
    with pytest.raises(UserError, match=r"step 1 reads neighbours of 20 of the 32 chunks .* places for 16; .*capacity=0\.625 or"):
        refuse_too_full(config(0.5), batch, "step 1")
    with pytest.raises(UserError, match=r"reads neighbours of 12 of the 16 chunks .* places for 8; .*capacity=0\.75 or"):
        refuse_too_full(config(0.5, data=2), batch, "step 1")
    absent = batch._replace(neighbour_mask=np.zeros_like(batch.neighbour_mask))
    refuse_too_full(config(0.1), absent, "step 1")
    refuse_too_full(config(0.1), batch._replace(neighbours=batch.neighbours[:, :, :0]), "step 1")


def run_of_few(folder: Path, capacity: float) -> int:
    """A tiny run in which only the first of a row's two chunks has neighbours: 4 of 8 are read, or fewer."""
    config = tiny_config(neighbour_capacity=capacity)

    def read(number: int) -> tuple[Batch, np.ndarray]:
        batch, ids = random_batch(number)
        mask = batch.neighbour_mask.copy()
        mask[:, 1] = False
        return batch._replace(neighbour_mask=mask), ids

    batches = grain.MapDataset.range(1000).map(read).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return fit(Job(name="tiny", config=config, model=config.model, folder=folder), iter(batches), None)


def test_a_run_with_places_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, dropout and neighbour dropout as without. With too few places it ends before the step, and goes on with more."""
    monkeypatch.setattr(capacity_module, "MULTIPLE", 1)
    run_of_few(tmp_path / "all", 1.0)
    with pytest.raises(UserError, match=r"tiny: step \d+ reads neighbours of 4 of the 8 chunks .*capacity=0\.5 or more"):
        run_of_few(tmp_path / "few", 0.375)
    run_of_few(tmp_path / "few", 0.5)
    found, expected = (read_lines(tmp_path / name / METRICS) for name in ("few", "all"))
    assert len(expected) == 4
    for line, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=1e-5)
