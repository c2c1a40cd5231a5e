"""A training step (forward, backward, AdamW) of a small Retro and of its GPT twin: tokens a second, the share of the machine's
measured matrix-product speed, and the same step in plain PyTorch.

Shape: 4 layers, width 256, 8 heads, feed-forward 1024, CCA in 2 and 4, 2 encoder layers, rows of 512 tokens, 4 rows, chunks of
64, 2 neighbours of 128 tokens, 8192 words, untied, float32; random tokens. The rival, `benchmarks.torch_retro`, runs eagerly and,
with --compile, also by torch.compile; without PyTorch its rows are left out. (Two published PyTorch trainers of this shape,
Megatron core's Retro and RETRO-pytorch, do about 1,230 tokens a second on 2 cores: measured elsewhere, not in this run.)

Rounds of all sides and of a matrix product alternate in one process. Beside wall time stands the process's CPU time, which other
programs on the machine disturb less. Before anything is timed our hidden states are checked against the reference implementation,
and the rival's loss and every gradient against ours.

    python -m benchmarks.train_step [--rounds 15] [--steps 2] [--compile]
    taskset -c 0 python -m benchmarks.train_step --output benchmarks/results/train_step_one_core.json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.step_time import random_rows, stepper
from benchmarks.timing import MATRIX, Timed, cpu_name, interleave, product, spread
from retro_jax.config import ChunkConfig, EncoderConfig, ModelConfig, OptimizerConfig, RetroConfig, TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.host_memory import keep_freed_memory
from retro_jax.model import Retro, count_parameters
from retro_jax.training.flops import train_flops
from retro_jax.training.loss import weighted_loss
from retro_jax.training.optimizer import is_trained
from retro_jax.training.state import model_form

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
    arguments.add_argument("--compile", action="store_true", help="time torch.compile of the rival too; takes a minute")
    arguments.add_argument("--output", type=Path, default=RESULTS)
    given = arguments.parse_args()

    kept = keep_freed_memory()
    batch, train = random_rows(RETRO, ROWS, LENGTH), TrainConfig(precision="float32")
    check(batch)
    models = {"retro": RETRO, "gpt": GPT}
    sides = {name: Timed(stepper(config, batch, train), given.steps) for name, config in models.items()}
    rivals = {name: Timed(call, given.steps) for name, call in rival_steps(batch, compiled=given.compile).items()}
    sides |= rivals
    sides["matmul"] = Timed(product(), 10)
    interleave(sides, given.rounds)

    ceiling = Ceiling(2 * MATRIX**3 / np.array(sides["matmul"].wall), 2 * MATRIX**3 / np.array(sides["matmul"].cpu))
    result = {
        "device": {"kind": jax.devices()[0].device_kind, "name": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__, **rival_version()},
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
        **{
            name: figures(RETRO, side, ceiling) | {"ours_is_faster": faster(sides["retro"], side)}
            for name, side in rivals.items()
        },
    }
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    for name in (*models, *rivals):
        side = result[name]
        print(
            f"{name:14s} {side['tokens_per_second']['median']:8.0f} tokens/s   {side['wall_seconds']['median']:.3f} s and "
            f"{side['cpu_seconds']['median']:.3f} CPU s a step   {side['gflops']['median']:.0f} GFLOP/s, of a matrix product's: "
            f"{side['share_of_matmul']['wall']['median']:.2f} by wall, {side['share_of_matmul']['cpu']['median']:.2f} by CPU time"
        )
    for name in rivals:
        times = result[name]["ours_is_faster"]
        print(f"ours is {times['wall']['median']:.2f} times as fast as {name}, {times['cpu']['median']:.2f} by CPU time")
    if not rivals:
        print("PyTorch is not installed: no rival was timed")
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


def rival_steps(batch: Batch, *, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Steps of the same model in PyTorch, after its loss and gradients were compared with ours; none without PyTorch."""
    if not importlib.util.find_spec("torch"):
        return {}
    # Its threads sleep at a barrier: spinning, they take the time of the very thread they wait for where another program holds a
    # core (measured: 4 times the seconds). What the user has set stands.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from benchmarks.torch_retro import TorchRetro, as_tensors, torch_loss, torch_names, torch_stepper

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    params, loss, gradient = loss_and_gradient(batch)
    model = TorchRetro(RETRO, LENGTH)
    model.load_state_dict({name: torch.tensor(a) for name, a in torch_names(RETRO, params).items()})
    rival_loss = torch_loss(model, *as_tensors(batch))
    rival_loss.backward()  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(rival_loss.item(), loss, rtol=1e-5)
    expected = torch_names(RETRO, gradient)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(parameter.grad.numpy() / largest, expected[name] / largest, atol=1e-4, err_msg=name)
    kinds = {"torch": False} | ({"torch compiled": True} if compiled else {})
    return {name: torch_stepper(copy.deepcopy(model), batch, OptimizerConfig(), compiled=c) for name, c in kinds.items()}


def loss_and_gradient(batch: Batch) -> tuple[Any, float, Any]:
    """Random parameters, large enough that attention chooses, with our loss and gradient there."""
    form = model_form(RETRO, is_trained(RETRO))
    params, frozen = form.split(Retro(RETRO, key=jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(tree, [p + 0.05 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])

    def loss_of(params: Any) -> jax.Array:
        model = form.merge(params, frozen)
        return weighted_loss(
            model(batch), model.output_table_VD(), batch.targets, batch.loss_mask / batch.loss_mask.sum(), chunk=2048
        )

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    return params, float(loss), gradient


def rival_version() -> dict[str, str]:
    """PyTorch's version, where it is installed."""
    return {"torch": importlib.metadata.version("torch")} if importlib.util.find_spec("torch") else {}


def faster(ours: Timed, other: Timed) -> dict:
    """How many times as long the other side's step takes, round by round."""
    return {
        "wall": spread(np.array(other.wall) / np.array(ours.wall)),
        "cpu": spread(np.array(other.cpu) / np.array(ours.cpu)),
    }


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
