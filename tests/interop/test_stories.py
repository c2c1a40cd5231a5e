"""A trained Llama of 260 thousand weights is read, computes its reference logits, and goes to transformers and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from retro_jax.cli import main
from retro_jax.data.batch import Batch
from retro_jax.interop.checkpoints import open_checkpoint
from retro_jax.interop.verify import logits, transformers_logits

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "model_stories260k"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="needs the trained model in ../shared/data, which is not there")


def in_halves(matrix_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows whose rotary pairs lie side by side, as rows whose pairs lie in two halves."""
    out, width = matrix_OI.shape
    return matrix_OI.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder of Hugging Face."""
    about = json.loads((STORIES / "stories260K.json").read_text())["config"]
    with np.load(STORIES / "stories260K.npz") as file:
        given = {name: file[name] for name in file.files}
    heads, kv_heads, layers = about["n_heads"], about["n_kv_heads"], about["n_layers"]
    tensors = {"model.embed_tokens.weight": given["tok_embeddings"], "model.norm.weight": given["norm"]}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": given["attention_norm"][layer],
            at + "post_attention_layernorm.weight": given["ffn_norm"][layer],
            at + "self_attn.q_proj.weight": in_halves(given["wq"][layer], heads),
            at + "self_attn.k_proj.weight": in_halves(given["wk"][layer], kv_heads),
            at + "self_attn.v_proj.weight": given["wv"][layer],
            at + "self_attn.o_proj.weight": given["wo"][layer],
            at + "mlp.gate_proj.weight": given["w1"][layer],
            at + "mlp.down_proj.weight": given["w2"][layer],
            at + "mlp.up_proj.weight": given["w3"][layer],
        }
    path = tmp_path_factory.mktemp("stories")
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path / "model.safetensors")
    config = {
        "model_type": "llama",
        "hidden_size": about["dim"],
        "intermediate_size": about["hidden_dim"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": about["vocab_size"],
        "max_position_embeddings": about["max_seq_len"],
        "rms_norm_eps": about["norm_eps"],
        "rope_theta": about["rope_theta"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@needs_stories
def test_reference_logits(folder: Path) -> None:
    opened = open_checkpoint("huggingface", folder, None)
    with np.load(STORIES / "reference_logits.npz") as file:
        tokens, expected = file["tokens"][None], file["logits"]
    length = tokens.shape[1]
    batch = Batch(
        tokens=tokens,
        targets=tokens,
        segments=np.ones(tokens.shape, np.int32),
        positions=np.arange(length, dtype=np.int32)[None],
        loss_mask=np.ones(tokens.shape, np.float32),
        neighbours=np.zeros((1, 1, 0, 1), np.int32),
        neighbour_mask=np.zeros((1, 1, 0, 1), bool),
    )
    np.testing.assert_allclose(logits(opened.config, opened.source, batch, None)[0], expected, atol=1e-4)


@needs_stories
def test_to_transformers(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out"
    arguments = ["--from", "huggingface", "--to", "huggingface", "--input", str(folder), "--output", str(out), "--verify"]
    assert main(["convert", *arguments]) == 0
    tokens = np.random.default_rng(0).integers(0, 512, (2, 40))
    np.testing.assert_array_equal(transformers_logits(out, tokens), transformers_logits(folder, tokens))
