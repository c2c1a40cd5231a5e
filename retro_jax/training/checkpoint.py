"""Checkpoints: parameters, optimizer, the place in the data, and the settings that made them.

A checkpoint ``<folder>/<step>/`` holds four Orbax items: ``params`` and ``optimizer`` (flat, by name), ``batches`` (grain's
iterator) and ``about`` (JSON: step, settings, a digest of every array). Saving is asynchronous and atomic: a folder named by
a number is whole. The last ``keep`` are kept, and the one with the lowest validation loss.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from retro_jax.config import ModelConfig, resolved
from retro_jax.errors import UserError
from retro_jax.field_types import config_from_plain
from retro_jax.model import Retro
from retro_jax.training.state import ModelForm, TrainState, digests, model_form, names, on_one_device
from retro_jax.training.stored_arrays import StoredArrays

PARAMS, OPTIMIZER, BATCHES, ABOUT = "params", "optimizer", "batches", "about"
LATEST, BEST = "latest", "best"
# Of a stack of layers larger than this each layer is stored by itself.
WHOLE_BYTES = 2**20
OS_ERROR = re.compile(r"os_error_code='(\d+)'")


@dataclass(frozen=True, kw_only=True)
class About:
    """What a checkpoint says of itself.

    ``valid_loss`` None where this step was not validated. ``settings`` are the resolved config of the run, ``config_text`` the
    same as the user would write it, ``data`` the fingerprints of what the batches are read from, ``progress`` what the metrics
    need to go on.
    """

    step: int
    valid_loss: float | None
    model: dict
    settings: dict
    config_text: str
    data: dict[str, str]
    progress: dict
    digests: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class KeepLatestAndBest(checkpoint_managers.PreservationPolicy):
    """Which checkpoints stay: the last ``keep``, and the one with the lowest validation loss."""

    keep: int
    valid_losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Orbax asks with all checkpoints, oldest first."""
        best = min((c.step for c in checkpoints if c.step in self.valid_losses), key=self.valid_losses.__getitem__, default=None)
        newest = {c.step for c in checkpoints[-self.keep :]}
        return [c.step in newest or c.step == best for c in checkpoints]


class Checkpoints:
    """The checkpoints of one model.

    Args:
        folder: where they are; made if it is not there.
        keep: how many of the latest stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every phase of a save, and errors that it raises too
        self.folder = Path(folder).absolute()
        self._valid_losses: dict[int, float] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=KeepLatestAndBest(keep, self._valid_losses),
            enable_async_checkpointing=True,
        )
        handlers = {
            PARAMS: ocp.StandardCheckpointHandler(),
            OPTIMIZER: ocp.StandardCheckpointHandler(),
            BATCHES: grain.checkpoint.CheckpointHandler(),
            ABOUT: ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        for step in self.steps:
            self._note_valid_loss(step)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._no_space_told() if error is None else nullcontext():
            self._manager.close()  # waits for the save under way

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The last step that was saved; None if none was."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss of those kept; None if none was validated."""
        return min((s for s in self.steps if s in self._valid_losses), key=self._valid_losses.__getitem__, default=None)

    def find(self, which: str | int) -> int:
        """The step of checkpoint "latest", "best", or a number.

        Raises:
            UserError: there is none such.
        """
        steps = self.steps
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none yet; train the model first"
        if which == BEST and self.best is None:
            raise UserError(
                f"no checkpoint in {self.folder} was validated, so none is the best; choose latest or a step ({there})"
            )
        step = {LATEST: self.latest, BEST: self.best}.get(str(which), which)
        if not str(step).isdecimal() or int(step) not in steps:  # type: ignore[arg-type]
            raise UserError(f"no checkpoint {which} in {self.folder}: {there}")
        return int(step)  # type: ignore[arg-type]

    def save(self, state: TrainState, batches: grain.DatasetIterator, about: About) -> None:
        """Start to save; ``state`` may be given to the next step as soon as this returns."""
        params, optimizer = _items(state)
        facts = dict(resolved(about), digests={name: int(value) for name, value in _digests({**params, **optimizer}).items()})
        if about.valid_loss is not None:
            self._valid_losses[about.step] = about.valid_loss
        items = {
            PARAMS: ocp.args.StandardSave(params, {name: _save_args(name, array) for name, array in params.items()}),
            OPTIMIZER: ocp.args.StandardSave(optimizer),
            BATCHES: grain.checkpoint.CheckpointSave(batches),
            ABOUT: ocp.args.JsonSave(facts),
        }
        with self._no_space_told():
            self._manager.save(about.step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Return when the last save is complete on disk."""
        with self._no_space_told():
            self._manager.wait_until_finished()

    def about(self, step: int) -> About:
        """What the checkpoint of ``step`` says of itself.

        Raises:
            UserError: it is corrupted.
        """
        try:
            return About(**self._read_about(step))
        except Exception as error:
            raise self.corrupted(step, error) from error

    def restore(self, step: int, abstract: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """The state saved at ``step``; ``batches`` is set to the place where it was.

        Args:
            abstract: shapes, dtypes and shardings of the state.

        Raises:
            UserError: it belongs to another model, or is corrupted.
        """
        params, optimizer = _items(abstract)
        self._refuse_other(step, PARAMS, _shapes(params))
        self._refuse_other(step, OPTIMIZER, _shapes(optimizer))
        found = self._restore(step, {PARAMS: params, OPTIMIZER: optimizer}, batches)
        leaves = [{**found[PARAMS], **found[OPTIMIZER]}[name] for name in _state_names(abstract)]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

    def restore_params(self, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The parameters saved at ``step``, by name."""
        self._refuse_other(step, PARAMS, _shapes(abstract))
        return self._restore(step, {PARAMS: abstract}, None)[PARAMS]

    def stored_params(self, step: int, shapes: Mapping[str, tuple[int, ...]]) -> StoredArrays:
        """The parameters saved at ``step``, to be read one by one; they are not checked against their digests.

        Args:
            shapes: of all parameters of the model, by name.

        Raises:
            UserError: the checkpoint belongs to another model, or is corrupted.
        """
        self._refuse_other(step, PARAMS, shapes)
        return StoredArrays(self.folder / str(step) / PARAMS)

    def corrupted(self, step: int, error: Exception) -> UserError:
        """What to tell the user of a checkpoint that cannot be read for this reason."""
        good = self._last_good(before=step)
        mend = f"delete it to continue from step {good}, the last good one"
        if good is None:
            mend = f"no earlier one is good; delete {self.folder} to train anew"
        return UserError(f"the checkpoint {self.folder / str(step)} is corrupted ({_first_line(error)}); {mend}")

    def _restore(
        self, step: int, items: dict[str, dict], batches: grain.DatasetIterator | None
    ) -> dict[str, dict[str, jax.Array]]:
        wanted: dict[str, Any] = {name: ocp.args.StandardRestore(abstract) for name, abstract in items.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**wanted))
            expected = self.about(step).digests
        except UserError:
            raise
        except Exception as error:
            raise self.corrupted(step, error) from error
        for name in items:
            for parameter, value in _digests(restored[name]).items():
                if int(value) != expected[parameter]:
                    raise self.corrupted(step, numbers_have_changed(parameter))
        if batches is not None:
            self._restore_batches(step, batches)
        return {name: restored[name] for name in items}

    def _restore_batches(self, step: int, batches: grain.DatasetIterator) -> None:
        """Any process's state is every process's, so that a run may go on with another number of them."""
        try:
            state = min((self.folder / str(step) / BATCHES).glob("process_*.json"))
            batches.set_state(json.loads(state.read_text()))
            batches.start_prefetch()
        except UserError:
            raise
        except Exception as error:
            raise self.corrupted(step, error) from error

    def _note_valid_loss(self, step: int) -> None:
        try:
            loss = self._read_about(step)["valid_loss"]
        except Exception as error:  # told to the user when this checkpoint is asked for
            logging.getLogger(__name__).info("checkpoint %d cannot be read: %s", step, error)
            return
        if loss is not None:
            self._valid_losses[step] = loss

    def _read_about(self, step: int) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(**{ABOUT: ocp.args.JsonRestore()}))[ABOUT]

    def _refuse_other(self, step: int, item: str, wanted: Mapping[str, tuple[int, ...]]) -> None:
        try:
            found = self._manager.item_metadata(step)[item].tree
            shapes = {name: tuple(facts.shape) for name, facts in found.items()}
        except Exception as error:
            raise self.corrupted(step, error) from error
        for name in [*wanted, *shapes]:
            here, there = wanted.get(name), shapes.get(name)
            if here is None or here != there:
                raise UserError(
                    f"the checkpoint {self.folder / str(step)} is of another model: {name} {_has_shape(there)} there and "
                    f"{_has_shape(here)} in this model; "
                    "use the config that it was trained with, or another --workdir"
                )

    @contextmanager
    def _no_space_told(self) -> Iterator[None]:
        """A save that fails for want of space raises at the next call: from Python with its number, from TensorStore in words."""
        try:
            yield
        except (OSError, ValueError) as error:
            written = OS_ERROR.search(str(error))
            number = int(written[1]) if written else getattr(error, "errno", None)
            if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            at = "the start" if self.latest is None else f"step {self.latest}, the last one saved"
            raise UserError(
                f"a checkpoint could not be written to {self.folder}: {os.strerror(number).lower()}; "
                f"free some space and run the same command again to continue from {at}"
            ) from error

    def _last_good(self, before: int) -> int | None:
        for step in reversed([s for s in self.steps if s < before]):
            try:
                if self._is_good(step):
                    return step
            except Exception as error:
                logging.getLogger(__name__).info("checkpoint %d is not good either: %s", step, error)
        return None

    def _is_good(self, step: int) -> bool:
        """Whether every array has its digest; one at a time, for a large model may fit only where it was trained."""
        expected, metadata = self._read_about(step)["digests"], self._manager.item_metadata(step)
        for item in (PARAMS, OPTIMIZER):
            stored = StoredArrays(self.folder / str(step) / item)
            if any(int(digests([stored.read(name)])[0]) != expected[name] for name in metadata[item].tree):
                return False
        return True


def load_model(folder: Path, which: str | int = LATEST) -> tuple[Retro, int]:
    """The model of a checkpoint and its step.

    Args:
        folder: a model's folder, ``<workdir>/models/<name>``.
        which: "latest", "best", or a step.

    Raises:
        UserError: there is no such checkpoint, or it is corrupted.
    """
    with opened_checkpoint(folder, which) as (checkpoints, step, config):
        form = model_form(config, lambda path: True)
        abstract = abstract_params(form)
        by_name = checkpoints.restore_params(step, dict(zip(names(abstract), jax.tree.leaves(abstract), strict=True)))
        params = jax.tree.unflatten(jax.tree.structure(abstract), [by_name[name] for name in names(abstract)])
    return form.merge(params, {}), step


@contextmanager
def opened_checkpoint(folder: Path, which: str | int) -> Iterator[tuple[Checkpoints, int, ModelConfig]]:
    """The checkpoints of a model, the step of the one that is meant, and its config; arguments as of :func:`load_model`.

    Raises:
        UserError: there is no such checkpoint, or it is corrupted.
    """
    path = Path(folder) / "checkpoints"
    if not path.is_dir():
        raise UserError(f"{path} is not there; train the model first: python train.py with the same config and --workdir")
    with Checkpoints(path, keep=1) as checkpoints:
        step = checkpoints.find(which)
        yield checkpoints, step, config_from_plain(ModelConfig, checkpoints.about(step).model)


def numbers_have_changed(name: str) -> ValueError:
    """Why a checkpoint is corrupted of which an array has another digest than when it was saved."""
    return ValueError(f"the numbers of {name} have changed")


def abstract_params(form: ModelForm) -> Any:
    """Shapes and dtypes of all parameters, nested, for one device."""
    return on_one_device(nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: Retro(form.config, key=jax.random.key(0))))[1]))


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state's arrays by name: the model's parameters, trained or not, and the rest."""
    params: dict[str, Any] = {}
    for tree in (state.params, state.frozen):
        params.update(zip(names(tree), jax.tree.leaves(tree), strict=True))
    rest = {"step": state.step, "moments": state.moments}
    return params, dict(zip(names(rest), jax.tree.leaves(rest), strict=True))


def _state_names(state: TrainState) -> list[str]:
    """The names that :func:`_items` gives to the leaves of the state, in the order of its leaves."""
    rest = names({"moments": state.moments})
    return ["step", *names(state.params), *names(state.frozen), *rest]


def _save_args(name: str, array: jax.Array) -> ocp.SaveArgs:
    """Of a large stack of layers each is stored by itself, so that it can be read by itself; all else in one piece."""
    return ocp.SaveArgs(shard_axes=(0,) if name.startswith("decoder.") and array.nbytes > WHOLE_BYTES else ())


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _digests(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    ordered = sorted(arrays)
    return dict(zip(ordered, jax.device_get(digests([arrays[name] for name in ordered])), strict=True))


def _has_shape(shape: tuple[int, ...] | None) -> str:
    return "is not" if shape is None else f"has shape {shape}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
