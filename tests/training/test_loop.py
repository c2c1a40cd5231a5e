"""What a run writes, and how it ends when the numbers do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from retro_jax.training.checkpoint import Checkpoints
from retro_jax.training.loop import NonFiniteLoss
from retro_jax.training.metrics import METRICS, TIMINGS, Totals, read_lines, truncate
from retro_jax.training.optimizer import is_trained, learning_rate, make_optimizer
from retro_jax.training.state import initial_state, model_form
from retro_jax.training.step import StepMetrics, make_train_step, make_valid_step
from tests.training.tiny import random_batch, run, tiny_batches, tiny_config

FOLDER, GOLDEN = Path(__file__).resolve().parents[1] / "golden", "training/tiny_metrics.jsonl"


def test_the_lines_hold_the_steps_of_a_loop_written_out(whole_run: Path) -> None:
    config = tiny_config()
    form = model_form(config.model, is_trained(config.model))
    optimizer = make_optimizer(config.optimizer, 12, form.trained)
    state, batches = initial_state(form, optimizer, 0), tiny_batches()
    train = jax.jit(make_train_step(form, optimizer, config.training), donate_argnums=0)
    valid = jax.jit(make_valid_step(form, config.training))
    expected, targets = [], 0
    window: list[StepMetrics] = []
    for step in range(1, 13):
        state, metrics = train(state, next(batches)[0])
        window.append(jax.device_get(metrics))
        targets += int(metrics.targets)
        if step % 3 == 0:
            loss = np.average([m.loss for m in window], weights=[m.targets for m in window])
            rate = float(learning_rate(config.optimizer, 12)(step - 1))
            expected.append(
                {"step": step, "loss": loss, "grad_norm": window[-1].grad_norm, "learning_rate": rate, "targets": targets}
            )
            window = []
        if step % 2 == 0:
            sums = np.sum([valid(state.params, state.frozen, random_batch(seed)[0]) for seed in (9999, 9998)], axis=0)
            expected.append({"step": step, "valid_loss": sums[0] / sums[1], "valid_targets": sums[1]})
    lines = read_lines(whole_run / METRICS)
    assert len(lines) == len(expected) == 10
    for line, want in zip(lines, expected, strict=True):
        assert line.keys() == want.keys()
        np.testing.assert_allclose(list(line.values()), list(want.values()), rtol=1e-6)


def test_the_curve_is_the_recorded_one(
    whole_run: Path, golden: Callable[[str, str], None], request: pytest.FixtureRequest
) -> None:
    """Any change of the model, its start, the loss or the optimizer shows here."""
    if request.config.getoption("--renew-goldens"):
        golden(GOLDEN, (whole_run / METRICS).read_text())
    lines, recorded = read_lines(whole_run / METRICS), read_lines(FOLDER / GOLDEN)
    assert [list(line) for line in lines] == [list(line) for line in recorded]
    for line, want in zip(lines, recorded, strict=True):
        # Processors round differently: after 12 steps AVX-512 and AVX2 differ by 2e-7.
        np.testing.assert_allclose(list(line.values()), list(want.values()), rtol=1e-5)


def test_timings_stand_beside_the_training_lines(whole_run: Path) -> None:
    lines = read_lines(whole_run / TIMINGS)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for before, line in zip([0.0, *seconds], lines, strict=False):
        np.testing.assert_allclose(line["tokens_per_second"], 3 * 4 * 16 / (line["seconds"] - before), rtol=1e-6)
        assert line["mfu"] is None  # the peak of a CPU is not known


def test_tensorboard_has_the_same_numbers(whole_run: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import u32  # noqa: F401  (the format of the file is theirs)

    (path,) = (whole_run / "tensorboard").iterdir()
    data, found, place = path.read_bytes(), {}, 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 8], "little")
        event = Event.FromString(data[place + 12 : place + 12 + size])
        found.update({(v.tag, event.step): v.simple_value for v in event.summary.value})
        place += 16 + size
    for line in read_lines(whole_run / METRICS):
        for name, value in line.items():
            if name != "step":
                np.testing.assert_allclose(found[name, line["step"]], value, rtol=1e-6)


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss) as stopped:
        run(tmp_path, tiny_config(), spoilt=6)  # batch 6 is step 7's
    message = str(stopped.value)
    assert message.startswith("tiny: the loss is nan and the gradient's norm nan at step 7; the last good checkpoint is ")
    assert "checkpoints/4; the batch's rows are the training chunks 6000-6001, 6002-6003, 6004-6005, 6006-6007;" in message
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [2, 3, 4, 6, 6]
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps == [4]


def test_it_is_found_before_the_checkpoint_of_its_own_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match="at step 4; no checkpoint was saved before; the batch"):
        run(tmp_path, tiny_config(), spoilt=3)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps == []


def test_without_validation_there_is_no_best(tmp_path: Path) -> None:
    from retro_jax.training.loop import Job, fit

    config = tiny_config()
    job = Job(name="tiny", config=config, model=config.model, folder=tmp_path)
    assert fit(job, tiny_batches(), None) == 12
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [3, 6, 9, 12]
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps == [8, 12] and checkpoints.best is None


def test_lines_behind_a_step_are_dropped_and_a_cut_one_too(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(lines) + '{"step": 4, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    truncate(path, 9)
    assert path.read_text() == "".join(lines)
    truncate(path, 2)
    assert path.read_text() == "".join(lines[:2])
    truncate(path, 0)
    assert path.read_text() == ""
    truncate(tmp_path / "none", 3)
    assert not (tmp_path / "none").exists()


def test_totals_weigh_steps_by_their_targets() -> None:
    totals = Totals()
    totals.add(StepMetrics(np.float32(2.0), np.float32(1.0), np.float32(10.0)), 0.5)  # type: ignore[arg-type]
    totals.add(StepMetrics(np.float32(5.0), np.float32(1.0), np.float32(20.0)), 0.25)  # type: ignore[arg-type]
    assert totals.loss == 4.0 and totals.targets == 30 and totals.seconds == 0.75
    again = Totals(**json.loads(json.dumps(totals.plain())))
    assert again == totals
    totals.clear_window()
    assert (totals.window_targets, totals.window_steps, totals.targets) == (0, 0, 30)
    assert dataclasses.asdict(again)["window_steps"] == 2
