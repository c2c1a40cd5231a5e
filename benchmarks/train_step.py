"""A training step (forward, backward, AdamW) of a small Retro and of its GPT twin: tokens a second, and the share of the
machine's measured matrix-product speed.

Shape: 4 layers, width 256, 8 heads, feed-forward 1024, CCA in 2 and 4, 2 encoder layers, rows of 512 tokens, 4 rows, chunks of
64, 2 neighbours of 128 tokens, 8192 words, untied, float32; random tokens. Two PyTorch trainers of this shape, Megatron core's
Retro and RETRO-pytorch, do about 1,230 tokens a second on 2 cores (measured elsewhere, not in this run).

Rounds of Retro, GPT and a matrix product alternate in one process. Beside wall time stands the process's CPU time, which other
programs on the machine disturb less. The result is checked against the reference implementation before anything is timed.

    python -m benchmarks.train_step [--rounds 15] [--steps 2]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.step_time import random_rows, stepper
from benchmarks.timing import MATRIX, Timed, cpu_name, interleave, product, spread
from retro_jax.config import ChunkConfig, EncoderConfig, ModelConfig, RetroConfig, TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.host_memory import keep_freed_memory
from retro_jax.model import Retro, count_parameters
from retro_jax.training.flops import train_flops

CHUNKS = ChunkConfig(chunk_len=64, num_neighbours=2, retrieved_len=128)
RETRO = ModelConfig(
    vocab_size=8192,
    width=256,
    num_layers=4,
    num_heads=8,
    ffn_dim=1024,
    tied_embedding=False,
    retro=RetroConfig(chunks=CHUNKS, cca_layers=(2, 4), encoder=EncoderConfig(num_layers=2)),
)
GPT = dataclasses.replace(RETRO, retro=None)
ROWS, LENGTH = 4, 512
RESULTS = Path(__file__).parent / "results" / "train_step.json"


class Ceiling(NamedTuple):
    """Floating-point operations of a matrix product by seconds, round by round."""

    wall: np.ndarray
    cpu: np.ndarray


def main() -> None:
    """Check, time, write and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--steps", type=int, default=2, help="training steps a round")
    arguments.add_argument("--output", type=Path, default=RESULTS)
    given = arguments.parse_args()

    kept = keep_freed_memory()
    batch, train = random_rows(RETRO, ROWS, LENGTH), TrainConfig(precision="float32")
    check(batch)
    models = {"retro": RETRO, "gpt": GPT}
    sides = {name: Timed(stepper(config, batch, train), given.steps) for name, config in models.items()}
    sides["matmul"] = Timed(product(), 10)
    interleave(sides, given.rounds)

    ceiling = Ceiling(2 * MATRIX**3 / np.array(sides["matmul"].wall), 2 * MATRIX**3 / np.array(sides["matmul"].cpu))
    result = {
        "device": {"kind": jax.devices()[0].device_kind, "name": cpu_name(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "keeps_freed_memory": kept,
        "load_average": os.getloadavg()[0],
        "rounds": given.rounds,
        "parameters": {"retro": count_parameters(RETRO), "gpt": count_parameters(GPT)},
        "matmul_gflops": {"wall": spread(ceiling.wall / 1e9), "per_cpu_second": spread(ceiling.cpu / 1e9)},
        **{name: figures(config, sides[name], ceiling) for name, config in models.items()},
        "retro_over_gpt": {
            "wall": spread(np.array(sides["retro"].wall) / np.array(sides["gpt"].wall)),
            "cpu": spread(np.array(sides["retro"].cpu) / np.array(sides["gpt"].cpu)),
            "flops": round(flops(RETRO) / flops(GPT), 3),
        },
    }
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("retro", "gpt"):
        side = result[name]
        print(
            f"{name:6s} {side['tokens_per_second']['median']:8.0f} tokens/s   {side['wall_seconds']['median']:.3f} s and "
            f"{side['cpu_seconds']['median']:.3f} CPU s a step   {side['gflops']['median']:.0f} GFLOP/s, of a matrix product's: "
            f"{side['share_of_matmul']['wall']['median']:.2f} by wall, {side['share_of_matmul']['cpu']['median']:.2f} by CPU time"
        )
    matmul = result["matmul_gflops"]
    print(f"matmul {matmul['wall']['median']:.0f} GFLOP/s, {matmul['per_cpu_second']['median']:.0f} a CPU second")
    ratio = result["retro_over_gpt"]
    print(
        f"retro / gpt: {ratio['wall']['median']:.2f} by wall, {ratio['cpu']['median']:.2f} by CPU time, {ratio['flops']} by FLOPs"
    )


def check(batch: Batch) -> None:
    """The hidden states of one row are the reference implementation's."""
    row = jax.tree.map(lambda a: a[:1], batch)
    hidden = []
    for implementation in ("xla", "reference"):
        config = dataclasses.replace(RETRO, implementation=implementation)
        hidden.append(jax.jit(lambda config=config: Retro(config, key=jax.random.key(0))(row))())
    np.testing.assert_allclose(*hidden, atol=1e-4)


def flops(config: ModelConfig) -> float:
    """Floating-point operations of one step."""
    neighbours = 0 if config.retro is None else CHUNKS.num_neighbours
    return train_flops(config, rows=ROWS, seq_len=LENGTH, neighbours=neighbours)


def figures(config: ModelConfig, side: Timed, ceiling: Ceiling) -> dict:
    """Speed of one side, and its share of the matrix product's in the same round."""
    wall, cpu = np.array(side.wall), np.array(side.cpu)
    done = flops(config)
    return {
        "tokens_per_second": spread(ROWS * LENGTH / wall),
        "wall_seconds": spread(wall),
        "cpu_seconds": spread(cpu),
        "gflop_per_step": round(done / 1e9, 2),
        "gflops": spread(done / wall / 1e9),
        "share_of_matmul": {
            "wall": spread(done / wall / ceiling.wall),
            "cpu": spread(done / cpu / ceiling.cpu),
        },
    }


if __name__ == "__main__":
    main()
