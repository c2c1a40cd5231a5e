"""The training loop of one model: steps, validation, checkpoints, metrics, and every way in which it can end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np

from retro_jax.config import Config, ModelConfig, resolved
from retro_jax.data.batch import Batch
from retro_jax.errors import UserError
from retro_jax.parallel.layout import make_layout
from retro_jax.parallel.processes import Agreement, are_several, is_first
from retro_jax.progress import Bar, progress_bar
from retro_jax.sole_writer import sole_writer
from retro_jax.training.capacity import encoded_share, refuse_too_full
from retro_jax.training.checkpoint import About, Checkpoints
from retro_jax.training.flops import peak_flops, train_flops
from retro_jax.training.interrupt import StopRequest, stop_requests
from retro_jax.training.metrics import MetricLog, Totals
from retro_jax.training.optimizer import is_trained, learning_rate, make_optimizer
from retro_jax.training.resume import refuse_other_data, say_what_changed
from retro_jax.training.start import from_checkpoint
from retro_jax.training.state import abstract_state, initial_state, model_form
from retro_jax.training.step import StepMetrics, TrainStep, compute_dtype, make_train_step, make_valid_step

CHECKPOINTS = "checkpoints"
ValidBatches = Callable[[], Iterable[tuple[Batch, np.ndarray]]]


class NonFiniteLoss(UserError):
    """The loss or the gradient is no finite number."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model to train.

    ``config`` is the run's, ``model`` the model's own (a baseline has another than the run), with its ``vocab_size``.
    ``folder`` takes ``checkpoints/``, ``metrics.jsonl``, ``timings.jsonl`` and ``tensorboard/``; ``name`` stands beside the
    progress bar. ``config_text`` is the run's config as its user would write it, ``data`` the fingerprints of what the batches
    are read from, by name; both are stored in each checkpoint.
    """

    name: str
    config: Config
    model: ModelConfig
    folder: Path
    config_text: str = ""
    data: Mapping[str, str] = field(default_factory=dict)


def fit(job: Job, batches: grain.DatasetIterator, valid_batches: ValidBatches | None) -> int:
    """Train from the last checkpoint, or from the start, to step ``TrainConfig.steps``.

    Args:
        job: what to train.
        batches: yields (Batch of NumPy arrays, chunk ids int64 [B, L]) without end; its state is stored in checkpoints.
        valid_batches: a fresh pass over the validation batches; None: no validation.

    Returns:
        How many steps were run now; 0 where nothing was left to do.

    Raises:
        UserError: a checkpoint is corrupted or of another model, another process trains in the folder, or the loss is not finite.
        SystemExit: with code 0, after SIGTERM and a checkpoint.
        KeyboardInterrupt: after SIGINT and a checkpoint.
    """
    train = job.config.training
    job.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if is_first():
            stack.enter_context(sole_writer(job.folder))
        checkpoints = stack.enter_context(Checkpoints(job.folder / CHECKPOINTS, train.keep))
        stack.callback(batches.close)
        latest = checkpoints.latest or 0
        if latest >= train.steps:
            print(f"{job.name}: all {train.steps} steps are done, nothing is left to do", flush=True)
            return 0
        loop = _Loop(job, checkpoints, batches, valid_batches)
        loop.start(latest)
        loop.log = stack.enter_context(MetricLog(job.folder, latest, writes=is_first()))
        stop = stack.enter_context(stop_requests())
        loop.compile()
        if stop:
            stop.leave(f"{job.name}: stopped at step {latest} of {train.steps}; run the same command again to continue")
        with progress_bar(job.name, train.steps, done=latest, shown=is_first()) as bar:
            loop.run(stop, bar)
        return train.steps - latest


class _Pending(NamedTuple):
    """A step whose metrics are still on the device."""

    step: int
    metrics: StepMetrics
    chunk_ids_BL: np.ndarray
    stop: jax.Array | bool


class _Loop:
    """The loop and what it carries. Metrics are fetched one step late, so that the device never waits for the host."""

    log: MetricLog

    def __init__(
        self, job: Job, checkpoints: Checkpoints, batches: grain.DatasetIterator, valid_batches: ValidBatches | None
    ) -> None:
        self.job, self.config, self.checkpoints = job, job.config.training, checkpoints
        self.batches, self.valid_batches = batches, valid_batches
        self.layout = make_layout(job.config.mesh)
        self.form = model_form(job.model, is_trained(job.model, self.config.trained))
        self.optimizer = make_optimizer(job.config.optimizer, self.config.steps, self.form.trained)
        self.rate = learning_rate(job.config.optimizer, self.config.steps)
        self.valid_step = jax.jit(make_valid_step(self.form, self.config, self.layout))
        self.totals = Totals()
        self.pending: _Pending | None = None
        self.agreement, self.stopping = Agreement(self.layout), False
        self.valid_loss: float | None = None
        self.note = ""

    def start(self, latest: int) -> None:
        """Draw the first parameters, or restore those of step ``latest``."""
        self.done = latest
        if latest == 0:
            self.state = initial_state(self.form, self.optimizer, self.config.seed, self.layout)
            if self.config.start_from is not None:
                self.state = from_checkpoint(self.state, self.form, self.config)
                print(f"{self.job.name}: starts from {self.config.start_from}", flush=True)
            return
        about = self.checkpoints.about(latest)
        path = self.checkpoints.folder / str(latest)
        refuse_other_data(about, self.job.data, path)
        say_what_changed(about, self.job.config, self.job.model, path)
        abstract = abstract_state(self.form, self.optimizer, self.layout)
        self.state = self.checkpoints.restore(latest, abstract, self.batches)
        self.totals = Totals(**about.progress)
        print(f"{self.job.name}: continues at step {latest} of {self.config.steps}", flush=True)

    def compile(self) -> None:
        """Compile the step for the batches' shapes, outside all timings."""
        self.next_batch = next(self.batches)
        step = jax.jit(make_train_step(self.form, self.optimizer, self.config, self.layout), donate_argnums=0)
        self.train_step: TrainStep = step.lower(self.state, self.place(self.next_batch[0])).compile()
        rows, T = self.job.config.data.batch_size, self.next_batch[0].tokens.shape[1]
        self.tokens = rows * T
        neighbours, share = self.next_batch[0].neighbours.shape[2], encoded_share(self.job.config)
        self.flops = train_flops(self.job.model, rows=rows, seq_len=T, neighbours=neighbours, share=share)
        peak = peak_flops(compute_dtype(self.config))
        self.peak = None if peak is None else peak * self.job.config.mesh.devices
        self.clock = time.perf_counter()

    def place(self, batch: Batch) -> Batch:
        """A batch of training, of which this process has its rows, on the devices."""
        return jax.device_put(batch) if self.layout is None else self.layout.place(batch, self.job.config.data.batch_size)

    def run(self, stop: StopRequest, bar: Bar) -> None:
        """All steps that are left."""
        while self.done < self.config.steps:
            batch, chunk_ids_BL = self.next_batch
            refuse_too_full(self.job.config, batch, f"{self.job.name}: step {self.done + 1}")
            placed = self.place(batch)
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.train_step(self.state, placed)
            self.done += 1
            previous, self.pending = self.pending, _Pending(self.done, metrics, chunk_ids_BL, self.agreement.ask(bool(stop)))
            self.settle(previous)
            self.after_step(stop)
            bar.advance(1, self.note)
            if self.stopping:
                stop.leave(
                    f"{self.job.name}: stopped at step {self.done} of {self.config.steps}, a checkpoint is saved; "
                    "run the same command again to continue"
                )
            if self.done < self.config.steps:
                self.next_batch = next(self.batches)
        self.checkpoints.wait()

    def settle(self, pending: _Pending | None) -> None:
        """Wait for a step's metrics; refuse what is not finite, and write what is due."""
        if pending is None:
            return
        step, metrics = pending.step, jax.device_get(pending.metrics)
        self.stopping = self.stopping or bool(pending.stop)
        if not (np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm)):
            what = f"the loss is {metrics.loss} and the gradient's norm {metrics.grad_norm}"
            raise self.non_finite(what, step, pending.chunk_ids_BL)
        now = time.perf_counter()
        self.totals.add(metrics, now - self.clock)
        self.clock = now
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.write(step, float(metrics.grad_norm))

    def write(self, step: int, grad_norm: float) -> None:
        """One line of metrics and timings."""
        totals = self.totals
        share = totals.window_steps / max(totals.window_seconds, 1e-9)
        rates = {"tokens_per_second": share * self.tokens, "flops_per_second": share * self.flops}
        mfu = None if self.peak is None else rates["flops_per_second"] / self.peak
        self.log.metrics(
            step, loss=totals.loss, grad_norm=grad_norm, learning_rate=float(self.rate(step - 1)), targets=totals.targets
        )
        self.log.timings(step, seconds=totals.seconds, **rates, mfu=mfu)
        speed = f"{rates['flops_per_second'] / 1e9:,.0f} GFLOP/s" if mfu is None else f"{mfu:.1%} MFU"
        valid = "" if self.valid_loss is None else f" valid {self.valid_loss:.3f}"
        self.note = f"loss {totals.loss:.3f}{valid} {rates['tokens_per_second']:,.0f} tokens/s {speed}"
        totals.clear_window()

    def after_step(self, stop: StopRequest) -> None:
        """Validate and save where that is due, or where the run is to stop, of which all processes hear at the same step."""
        step = self.done
        if not are_several():
            self.stopping = bool(stop)
        save = step == self.config.steps or step % self.config.checkpoint_every == 0
        validate = self.valid_batches is not None and (save or step % self.config.valid_every == 0)
        if not (save or validate or self.stopping):
            return
        pending, self.pending = self.pending, None
        self.settle(pending)
        valid_loss = self.validate() if validate else None
        if not are_several():
            self.stopping = bool(stop)  # also when the request came during validation
        if save or self.stopping:
            self.save(valid_loss)
        if self.stopping:
            self.checkpoints.wait()
        self.clock = time.perf_counter()

    def validate(self) -> float:
        """Mean loss over the validation batches' targets; written, and kept for the next checkpoint."""
        assert self.valid_batches is not None
        place = jax.device_put if self.layout is None else self.layout.place  # every process reads all of these rows
        sums = [self.valid_step(self.state.params, self.state.frozen, place(batch)) for batch, _ in self.valid_batches()]
        loss, targets = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
        self.valid_loss = float(loss / targets)
        if not np.isfinite(self.valid_loss):
            raise self.non_finite(f"the validation loss is {self.valid_loss}", self.done, None)
        self.log.metrics(self.done, valid_loss=self.valid_loss, valid_targets=int(targets))
        return self.valid_loss

    def save(self, valid_loss: float | None) -> None:
        """Start to save the state, which is known to be finite."""
        about = About(
            step=self.done,
            valid_loss=valid_loss,
            model=resolved(self.job.model),
            settings=resolved(self.job.config),
            config_text=self.job.config_text,
            data=dict(self.job.data),
            progress=self.totals.plain(),
        )
        self.checkpoints.save(self.state, self.batches, about)

    def non_finite(self, what: str, step: int, chunk_ids_BL: np.ndarray | None) -> NonFiniteLoss:
        """The error that ends the run, with all that is needed to look into it."""
        self.checkpoints.wait()
        good = self.checkpoints.latest
        kept = "no checkpoint was saved before"
        if good is not None:
            kept = f"the last good checkpoint is {self.checkpoints.folder / str(good)}"
        rows = "" if chunk_ids_BL is None else f"; the batch's rows are the training chunks {_ranges(chunk_ids_BL)}"
        return NonFiniteLoss(
            f"{self.job.name}: {what} at step {step}; {kept}{rows}; "
            "lower OptimizerConfig.learning_rate, lengthen warmup_steps or lower clip_norm, and train in another --workdir"
        )


def _ranges(chunk_ids_BL: np.ndarray) -> str:
    """The chunk ids of each row, consecutive ones as first-last."""
    rows = []
    for ids_L in np.asarray(chunk_ids_BL):
        ids_L = ids_L[ids_L >= 0]
        runs = np.split(ids_L, np.flatnonzero(np.diff(ids_L) != 1) + 1) if len(ids_L) else []
        rows.append("+".join(f"{run[0]}-{run[-1]}" for run in runs) or "none")
    return ", ".join(rows)
