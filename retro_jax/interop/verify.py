"""Whether two checkpoints are the same model: both run on the same tokens, each by its own implementation where that is here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.config import ModelConfig
from retro_jax.data.batch import Batch
from retro_jax.errors import UserError
from retro_jax.interop import HUGGINGFACE
from retro_jax.interop.checkpoints import MEGATRON, Opened, open_checkpoint
from retro_jax.interop.files import Source
from retro_jax.interop.megatron import as_stored
from retro_jax.interop.slots import form_of, slots, stacked

ROWS, CHUNKS = 2, 3
# The largest difference of logits, as a share of the largest logit.
TOLERANCE = 1e-5


def verify(opened: Opened, source: str, path: Path, target: str, folder: Path, dtype: np.dtype | None) -> str:
    """Compare the input's logits with the output's on random tokens (and neighbours).

    Returns:
        What was compared and found, in a sentence.

    Raises:
        UserError: they differ.
    """
    config = opened.config
    batch = random_batch(config)
    expected = logits(config, opened.source, batch, dtype)
    again = open_checkpoint(target, folder, as_stored(config) if target in MEGATRON else None)
    found = {f"{target} read back": logits(again.config, again.source, batch, None)}
    if config.retro is None and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        for kind, at, name in ((source, path, "transformers on the input"), (target, folder, "transformers on the output")):
            if kind == HUGGINGFACE and (dtype is None or at == folder):
                found[name] = transformers_logits(at, batch.tokens)
    size = float(np.abs(expected).max())
    errors = {name: float(np.abs(values - expected).max()) / size for name, values in found.items()}
    for name, error in errors.items():
        if not error < TOLERANCE:
            raise UserError(f"the logits of the input and of {name} differ by {error:.1e} of the largest; nothing is written")
    return "verified: logits as " + ", ".join(f"{name} (to {error:.0e} of the largest)" for name, error in errors.items())


def random_batch(config: ModelConfig) -> Batch:
    """Rows of random tokens, with random neighbours for a Retro."""
    random, retro = np.random.default_rng(0), config.retro
    length = min(CHUNKS * retro.chunks.chunk_len if retro else 32, config.max_positions)
    chunks = length // retro.chunks.chunk_len if retro else length
    shape = (ROWS, chunks, retro.chunks.num_neighbours, retro.chunks.retrieved_len) if retro else (ROWS, chunks, 0, 1)
    assert config.vocab_size is not None
    tokens = random.integers(0, config.vocab_size, (ROWS, length), np.int32)
    return Batch(
        tokens=tokens,
        targets=tokens,
        segments=np.ones(tokens.shape, np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (ROWS, 1)),
        loss_mask=np.ones(tokens.shape, np.float32),
        neighbours=random.integers(0, config.vocab_size, shape, np.int32),
        neighbour_mask=np.ones(shape, bool),
    )


def logits(config: ModelConfig, source: Source, batch: Batch, dtype: np.dtype | None) -> np.ndarray:
    """Our logits in float32, of parameters rounded to ``dtype`` first where one is given."""

    def read(name: str) -> np.ndarray:
        values = source.read(name)
        return (values if dtype is None else values.astype(dtype)).astype(np.float32)

    params = jax.tree.map(jnp.asarray, stacked(config, {name: read(name) for name in slots(config)}))
    form = form_of(config)

    @jax.jit
    def run(params: dict) -> jax.Array:
        model = form.merge(params, {})
        return jnp.einsum("btd,vd->btv", model(batch), model.output_table_VD())

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(params))


def transformers_logits(folder: Path, tokens_BT: np.ndarray) -> np.ndarray:
    """What Hugging Face's own code computes from a folder, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens_BT.astype(np.int64))).logits.numpy()
