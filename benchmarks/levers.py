"""What three ways to do less around the kernels give, end to end.

- Encode the neighbours of the chunks that some token reads alone: ``TrainConfig.neighbour_capacity``.
- Encode a neighbour that stands several times in a batch once.
- Project the keys and values of all CCA layers in one product.

Which share of a run's neighbours the first two concern is counted over batches of its prepared data, in the order of training.
For the first, training steps on the first of these batches are timed, with the automatic capacity against all places. For the
second only the share is told: it bounds what there is to gain. For the third the products themselves are timed, forward and
with gradients, joined and apart.

    python -m benchmarks.levers --runs FOLDER... [--rounds 15]     (folders made by python -m retro_jax prepare)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.step_time import stepper
from benchmarks.timing import Timed, cpu_name, interleave, spread
from benchmarks.train_step import RETRO
from retro_jax.config import Config, TrainConfig
from retro_jax.data.pipeline import TrainingBatches, training_batches
from retro_jax.data.reader import neighbour_filter, open_reader
from retro_jax.data.training_rows import TrainingRows, training_rows
from retro_jax.gin_config import load_config
from retro_jax.model import with_vocab
from retro_jax.prepare import Prepared, prepare
from retro_jax.training.capacity import automatic_capacity, encoded_share

RESULTS = Path(__file__).parent / "results" / "levers.json"
BATCHES, ROWS = 50, 8
CCA_LAYERS = 4


def main() -> None:
    """Count, time, write and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=Path, nargs="+", required=True, help="run folders with their config.gin and data/")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--output", type=Path, default=RESULTS)
    given = arguments.parse_args()
    result = {
        "device": {"kind": jax.devices()[0].device_kind, "name": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"jax": jax.__version__},
        "load_average": os.getloadavg()[0],
        "batches": BATCHES,
        "rows": ROWS,
        "runs": {run.resolve().name: batch_shares(run) | packed_step(run, given.rounds) for run in given.runs},
        "joined_over_apart": joined_products(given.rounds),
    }
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, found in result["runs"].items():
        print(
            f"{name}: {found['unread']:.1%} of the neighbours are not read, {found['absent']:.1%} absent; with places for "
            f"{found['places']:.1%} a step takes {found['packed_over_all']['median']:.3f} of its time; "
            f"{found['repeated']:.1%} repeat one of the batch"
        )
    for name, ratio in result["joined_over_apart"].items():
        print(f"one product for {CCA_LAYERS} CCA layers, {name}: {ratio['median']:.3f} of the time of {CCA_LAYERS}")


def opened(run: Path) -> tuple[Config, TrainingRows, Prepared, TrainingBatches]:
    """A run's config with ``ROWS`` rows a batch, its data, and its batches."""
    config = load_config([run / "config.gin"])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=ROWS))
    prepared = prepare(config, run / "data", report=lambda line: None, build=False)
    weights = config.corpus.weights
    rows = training_rows(prepared.tables["train"], config.data.seq_len, weights=weights)
    reader = open_reader(config, prepared, "train", neighbours=True)
    return config, rows, prepared, training_batches(rows, reader, config.data, weights=weights)


def batch_shares(run: Path) -> dict[str, float]:
    """Of the neighbours in a run's batches: how many are absent, how many present ones no token reads, and how many of the
    others stand in the same batch before."""
    config, _, prepared, batches = opened(run)
    table, k, keep = prepared.tables["train"], config.chunks.num_neighbours, neighbour_filter(config)
    counts = np.zeros(4, np.int64)
    for _ in range(BATCHES):
        ids_BL = next(batches)[1]
        neighbours_BLK = prepared.neighbours["train"].select(ids_BL, k, keep=keep)
        full_BL = (ids_BL >= 0) & (np.asarray(table.remaining_N)[np.maximum(ids_BL, 0)] >= table.chunk_len)
        present_BLK = neighbours_BLK >= 0
        read = neighbours_BLK[present_BLK & full_BL[:, :, None]]
        counts += [neighbours_BLK.size, (~present_BLK).sum(), (present_BLK & ~full_BL[:, :, None]).sum(), len(np.unique(read))]
    batches.close()
    total, absent, unread, distinct = counts.tolist()
    return {"absent": absent / total, "unread": unread / total, "repeated": (total - absent - unread - distinct) / total}


def packed_step(run: Path, rounds: int) -> dict[str, Any]:
    """The share of the chunks that have places by the automatic capacity, and CPU time of a step with it over that of one with
    places for all."""
    config, rows, prepared, batches = opened(run)
    batch = next(batches)[0]
    batches.close()
    retro = dataclasses.replace(RETRO.retro, chunks=config.chunks)
    model = with_vocab(dataclasses.replace(RETRO, vocab_size=None, retro=retro), prepared.tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model)
    capacity = automatic_capacity(config, rows, prepared.tables["train"])
    trains = {"packed": TrainConfig(precision="float32", neighbour_capacity=capacity), "all": TrainConfig(precision="float32")}
    places = encoded_share(dataclasses.replace(config, training=trains["packed"]))
    sides = {name: Timed(stepper(model, batch, train)) for name, train in trains.items()}
    interleave(sides, rounds)
    return {"places": places, "packed_over_all": spread(np.array(sides["packed"].cpu) / np.array(sides["all"].cpu))}


def joined_products(rounds: int) -> dict[str, dict]:
    """One product of all CCA layers' key and value weights over one for each, by CPU time."""
    width, tokens = RETRO.width, 8192
    keys = jax.random.split(jax.random.key(0), 2)
    e_XD = jax.random.normal(keys[0], (tokens, width))
    weights_NDE = jax.random.normal(keys[1], (CCA_LAYERS, width, 2 * width)) / width**0.5

    def apart(e_XD: jax.Array, weights_NDE: jax.Array) -> list[jax.Array]:
        return [e_XD @ weight for weight in weights_NDE]

    def joined(e_XD: jax.Array, weights_NDE: jax.Array) -> list[jax.Array]:
        together = e_XD @ weights_NDE.swapaxes(0, 1).reshape(width, -1)
        return jnp.split(together, CCA_LAYERS, axis=1)

    sides = {}
    for name, project in (("apart", apart), ("joined", joined)):
        sides[f"{name} forward"] = Timed(_call(jax.jit(project), e_XD, weights_NDE))
        gradients = jax.jit(jax.grad(lambda e, w, p=project: sum(jnp.vdot(y, y) for y in p(e, w)), argnums=(0, 1)))
        sides[f"{name} with gradients"] = Timed(_call(gradients, e_XD, weights_NDE))
    interleave(sides, rounds)
    return {
        what: spread(np.array(sides[f"joined {what}"].cpu) / np.array(sides[f"apart {what}"].cpu))
        for what in ("forward", "with gradients")
    }


def _call(function: Callable[..., Any], *arguments: jax.Array) -> Callable[[], Any]:
    return lambda: function(*arguments)


if __name__ == "__main__":
    main()
