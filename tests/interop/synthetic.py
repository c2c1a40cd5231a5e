"""Checkpoints of any size out of repeated random numbers, and what memory it takes to convert them:
``python -m tests.interop.synthetic JSON``."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.cli import main as command
from retro_jax.config import Config, EncoderConfig, ModelConfig, RetroConfig, resolved
from retro_jax.interop.checkpoints import Opened, write_checkpoint
from retro_jax.interop.files import Fact
from retro_jax.interop.format import OURS, entries
from retro_jax.interop.slots import slots, stacked
from retro_jax.training.checkpoint import About, Checkpoints
from retro_jax.training.state import TrainState
from tests.training.tiny import tiny_batches

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 2**20
NUMBERS = np.random.default_rng(0).standard_normal(2**20 + 7).astype(np.float32)


def retro(width: int, layers: int, vocab: int, *, cca_every: int = 3) -> ModelConfig:
    """A Retro that Megatron core can hold, with two layers of encoder and without biases."""
    return ModelConfig(
        vocab_size=vocab,
        width=width,
        num_layers=layers,
        num_heads=width // 64,
        ffn_dim=4 * width,
        linear_bias=False,
        retro=RetroConfig(
            cca_layers=tuple(range(cca_every, layers + 1, cca_every)),
            cca_positions="none",
            cross_document=True,
            encoder=EncoderConfig(num_layers=2, positions="none", padding="attended", cross_residual="normed"),
        ),
    )


class Drawn:
    """The parameters of a model: finite numbers that differ from name to name, made when they are read."""

    def __init__(self, config: ModelConfig) -> None:
        self.facts = {name: Fact(slot.shape, np.dtype(np.float32)) for name, slot in slots(config).items()}

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(fact.nbytes for fact in self.facts.values())

    def read(self, name: str) -> np.ndarray:
        shape = self.facts[name].shape
        return np.resize(np.roll(NUMBERS, zlib.crc32(name.encode()) % len(NUMBERS)), shape)


def write_retro(config: ModelConfig, folder: Path) -> None:
    """The model as safetensors under our names."""
    folder.mkdir()
    write_checkpoint("retro", folder, Opened(config, Drawn(config), entries(config, OURS), []))


def write_run(config: ModelConfig, folder: Path) -> None:
    """The model as training saves it; all of it is in memory."""
    drawn = Drawn(config)
    params = jax.tree.map(jnp.asarray, stacked(config, {name: drawn.read(name) for name in drawn.facts}))
    about = About(
        step=1, valid_loss=None, model=resolved(config), settings=resolved(Config()), config_text="", data={}, progress={}
    )
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), params, {}, ()), tiny_batches(), about)


def memory_of(*conversions: list[object]) -> list[tuple[float, float]]:
    """MiB that a process of its own held before and at the peak of each conversion, one after another."""
    given = json.dumps([list(map(str, arguments)) for arguments in conversions])
    done = subprocess.run(
        [sys.executable, "-m", "tests.interop.synthetic", given], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the conversions, and print what each took."""
    taken = []
    for arguments in json.loads(sys.argv[1]):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        assert command(["convert", *arguments]) == 0
        taken.append((before, _status("VmHWM")))
    print(json.dumps(taken))


def _status(kind: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024 / MIB


if __name__ == "__main__":
    main()
