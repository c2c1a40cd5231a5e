"""Hold the model against fixtures: numbers that other implementations computed, with their weights and inputs.

    python -m tests.oracles.run FILE.npz ... [--weights FOLDER]

Reads any file with ``param/<name>``, ``in/...``, ``f64/logits``, ``grad/<name>`` or ``grad_f64/<name>``, and ``meta_json``, which
says by ``resolved`` (Megatron) or ``config`` (Hugging Face) what was computed; of BERT's form also ``f64/last_hidden_state``,
``f64/pooler_output``; and sentences with ``f64/embeddings``, whose weights are those of a package or of ``--weights``. Every
fixture gets a line for each precision; the exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.config import ModelConfig
from retro_jax.data.batch import Batch
from retro_jax.interop.format import Entry, Format, entries
from retro_jax.interop.huggingface import format_of, model_config
from retro_jax.interop.megatron import CORE, LEGACY
from retro_jax.interop.slots import form_of, slots, stacked, take
from retro_jax.training.state import Tree, names
from tests.oracles.bert import bert_fixture, compare_bert, is_bert
from tests.oracles.megatron_settings import config_of_settings, megatron_batch

# A gradient fails by its relative L2 error or by its largest error.
RELATIVE, ABSOLUTE = 5e-5, 1e-5
# Largest error of logits: in float32, and where some logit is larger than 10; in float64 with rotary positions, whose tables are
# float32 in every implementation but differ in the last bit, and without.
FLOAT32, FLOAT32_LARGE, FLOAT64_ROTARY, FLOAT64 = 5e-5, 1e-4, 1e-5, 1e-10


@dataclass(frozen=True)
class Fixture:
    """A file, read: our config, its names, its inputs as a batch, and which targets count for how much."""

    arrays: Mapping[str, np.ndarray]
    config: ModelConfig
    format: Format
    batch: Batch

    def named(self, kind: str) -> dict[str, np.ndarray]:
        """All arrays of a kind ("param") by their names."""
        return {name.removeprefix(f"{kind}/"): array for name, array in self.arrays.items() if name.startswith(f"{kind}/")}


@dataclass(frozen=True)
class Errors:
    """What was found; gradients None where the fixture has none."""

    logits: float
    loss: float
    gradient: tuple[float, str] | None
    gradient_absolute: float
    bound: float

    @property
    def passes(self) -> bool:
        """Whether all is within the gates."""
        gradient = self.gradient is None or self.gradient[0] < RELATIVE
        return self.logits < self.bound and self.loss < self.bound and gradient and self.gradient_absolute < ABSOLUTE


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracles.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.npz")
    parser.add_argument("--weights", type=Path, help="the folder of the sentence encoder of a fixture that holds none")
    given = parser.parse_args(arguments)
    failed = False
    for path in given.files:
        arrays = read_arrays(path)
        if is_bert(arrays):
            failed |= not _bert_passes(path.stem, arrays, given.weights)
            continue
        fixture = read_fixture(path)
        for precision in ("float32", "float64"):
            errors = compare(fixture, precision)
            failed |= not errors.passes
            print(line(path.stem, precision, errors), flush=True)
    return 1 if failed else 0


def _bert_passes(name: str, arrays: Mapping[str, np.ndarray], weights: Path | None) -> bool:
    """Print the lines of an encoder's fixture."""
    try:
        fixture = bert_fixture(arrays, weights)
    except FileNotFoundError as error:
        print(f"FAIL {name}: {error}")
        return False
    passes = True
    for precision in ("float32", "float64"):
        errors = compare_bert(fixture, precision)
        passes &= errors.passes
        print(f"{'PASS' if errors.passes else 'FAIL'} {name} {precision}: {errors}", flush=True)
    return passes


def line(name: str, precision: str, errors: Errors) -> str:
    gradient = "no gradients"
    if errors.gradient is not None:
        gradient = f"worst gradient {errors.gradient[0]:.1e} ({errors.gradient[1]})"
    verdict = "PASS" if errors.passes else "FAIL"
    return (
        f"{verdict} {name} {precision}: logits {errors.logits:.1e} (gate {errors.bound:.0e}), loss {errors.loss:.1e}, {gradient}"
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def read_fixture(path: Path) -> Fixture:
    arrays = read_arrays(path)
    meta = json.loads(arrays["meta_json"].tobytes())
    if "resolved" in meta:
        settings = meta["resolved"]
        format_ = LEGACY if settings["family"] == "megatron-legacy" else CORE
        return Fixture(arrays, config_of_settings(settings), format_, megatron_batch(arrays, settings))
    config = model_config(meta["config"])
    return Fixture(arrays, config, format_of(meta["config"]), _hugging_face_batch(arrays))


def compare(fixture: Fixture, precision: str) -> Errors:
    """Our logits, loss and gradients in this precision against the fixture's float64 ones."""
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        return _compare(fixture, np.dtype(precision))


def _compare(fixture: Fixture, dtype: np.dtype) -> Errors:
    arrays, config = fixture.arrays, fixture.config
    params = to_ours(fixture, fixture.named("param"), dtype)
    (loss, logits), gradient = jax.jit(jax.value_and_grad(loss_and_logits(fixture), has_aux=True))(params)
    counted = fixture.batch.segments > 0
    wanted = arrays["f64/logits"]
    bound = FLOAT32 if np.abs(wanted).max() < 10 else FLOAT32_LARGE
    if dtype == np.float64:
        bound = FLOAT64_ROTARY if config.positions == "rotary" else FLOAT64
    wanted_loss = arrays["f64/loss"] if arrays.get("f64/loss", np.zeros((), np.float32)).dtype == np.float64 else None
    loss_error = abs(float(loss) - float(arrays["out/loss"] if wanted_loss is None else wanted_loss))
    if wanted_loss is None:
        loss_error = max(0.0, loss_error - 1e-6 * abs(float(loss)))  # stored in float32
    worst, largest = _gradient_errors(fixture, gradient)
    return Errors(float(np.abs(np.asarray(logits) - wanted)[counted].max()), loss_error, worst, largest, bound)


def to_ours(fixture: Fixture, theirs: Mapping[str, np.ndarray], dtype: np.dtype) -> Tree:
    """The fixture's tensors as our parameters; each must be used, and each of ours be there."""
    places, left = slots(fixture.config), set(theirs)
    if fixture.config.tied_embedding:
        left.discard(fixture.format.tied_output)
    ours: dict[str, np.ndarray] = {}
    for entry in _entries(fixture):
        left -= set(entry.theirs)
        shapes = [places[name].shape for name in entry.ours]
        ours.update(zip(entry.ours, entry.layout.unpack([theirs[name] for name in entry.theirs], shapes), strict=True))
    if left:
        raise ValueError(f"the model has no place for {sorted(left)}")
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), stacked(fixture.config, ours))


def _entries(fixture: Fixture) -> list[Entry]:
    return entries(fixture.config, fixture.format)


def loss_and_logits(fixture: Fixture) -> Callable[[Tree], tuple[jax.Array, jax.Array]]:
    """The weighted mean of the fixture's targets' losses, and the logits."""
    form, batch = form_of(fixture.config), fixture.batch

    def compute(params: Tree) -> tuple[jax.Array, jax.Array]:
        model = form.merge(params, {})
        logits_BTV = jnp.einsum("btd,vd->btv", model(batch), model.output_table_VD())
        at_targets = jnp.take_along_axis(logits_BTV, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
        losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - at_targets
        weights_BT = jnp.asarray(batch.loss_mask, losses_BT.dtype)
        return (losses_BT * weights_BT).sum() / weights_BT.sum(), logits_BTV

    return compute


def _gradient_errors(fixture: Fixture, gradient: Tree) -> tuple[tuple[float, str] | None, float]:
    """The worst relative error with its parameter's name, and the largest absolute one."""
    kind = "grad_f64" if fixture.named("grad_f64") else "grad"
    theirs = fixture.named(kind)
    if not theirs:
        return None, 0.0
    wanted = to_ours(fixture, theirs, np.dtype(np.float64 if jax.config.jax_enable_x64 else np.float32))
    worst, largest = (0.0, "none"), 0.0
    by_path = [_by_path(tree) for tree in (gradient, wanted)]
    for name, slot in slots(fixture.config).items():
        ours, right = (np.asarray(take(tree, slot), np.float64) for tree in by_path)
        largest = max(largest, float(np.abs(ours - right).max()))
        if name.endswith("key_value.bias"):
            ours, right = ours[1], right[1]  # softmax does not see a shift of all keys: the true gradient is 0
        size = float(np.linalg.norm(right))
        relative = float(np.linalg.norm(ours - right)) / size if size > ABSOLUTE else 0.0
        worst = max(worst, (relative, name))
    return worst, largest


def _by_path(tree: Tree) -> dict[Any, Any]:
    return {
        tuple(int(part) if part.isdecimal() else part for part in name.split(".")): leaf
        for name, leaf in zip(names(tree), jax.tree.leaves(tree), strict=True)
    }


def _hugging_face_batch(arrays: Mapping[str, np.ndarray]) -> Batch:
    """Positions count through padding; a target is the next token, and -100 is none."""
    tokens, mask, labels = (arrays[f"in/{name}"].astype(np.int32) for name in ("input_ids", "attention_mask", "labels"))
    rows, length = tokens.shape
    targets = np.concatenate([labels[:, 1:], np.full((rows, 1), -100, np.int32)], axis=1)
    return Batch(
        tokens=tokens,
        targets=np.maximum(targets, 0),
        segments=mask,
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        loss_mask=(targets >= 0).astype(np.float32),
        neighbours=np.zeros((rows, 1, 0, 1), np.int32),
        neighbour_mask=np.zeros((rows, 1, 0, 1), bool),
    )


if __name__ == "__main__":
    sys.exit(main())
