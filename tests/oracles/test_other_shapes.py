"""The runner holds for fixtures of other shapes than those that are here, made by an implementation written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retro_jax.interop.convert import shapes_there
from retro_jax.interop.format import Format, entries
from retro_jax.interop.megatron import CORE, LEGACY
from retro_jax.interop.slots import shapes_of
from tests.oracles.by_hand import logits_by_hand, make_fixture, meta_json
from tests.oracles.megatron_settings import config_of_settings
from tests.oracles.run import main, read_fixture

FIXTURES = Path(__file__).parent.parent / "fixtures"

SETTINGS: dict[str, Any] = {
    "family": "megatron-core",
    "num_layers": 3,
    "hidden_size": 24,
    "num_heads": 3,
    "head_dim": 8,
    "ffn_hidden_size": 40,
    "vocab_size": 50,
    "normalization": "LayerNorm",
    "zero_centered_gamma": False,
    "norm_epsilon": 1e-5,
    "final_norm": True,
    "activation": "gelu_erf",
    "linear_bias": True,
    "positions": "learned",
    "rotary_percent": None,
    "rotary_base": None,
    "max_positions": 40,
    "tied_embeddings": True,
    "retro_layers_1based": [2, 3],
    "encoder_layers": 2,
    "encoder_positions": "learned",
    "encoder_cross_attention_residual": "normalised",
    "chunk_length": 8,
    "num_neighbours": 2,
    "retrieved_length": 16,
    "sequence_length": 24,
    "batch_size": 2,
    "document_reset_mask": False,
    "cross_document_cca": True,
    "gate": 1.0,
}
ROTARY = {
    "positions": "rotary",
    "encoder_positions": "none",
    "rotary_percent": 0.5,
    "rotary_base": 10000.0,
    "max_positions": None,
}
GATED = {"activation": "swiglu", "linear_bias": False}
UNNORMED = {"encoder_cross_attention_residual": "unnormalised"}
SHAPES: dict[str, dict[str, Any]] = {
    "one neighbour, a remainder of 1": {"num_neighbours": 1, "sequence_length": 17},
    "three neighbours, RMSNorm, a remainder of 7, documents": {
        **ROTARY,
        **GATED,
        "normalization": "RMSNorm",
        "num_neighbours": 3,
        "sequence_length": 23,
        "document_reset_mask": True,
    },
    "heads narrower than the model, whole rotary, squared ReLU": {
        **ROTARY,
        "rotary_percent": 1.0,
        "head_dim": 4,
        "activation": "squared_relu",
        "tied_embeddings": False,
    },
    "learned positions in documents, no final norm, three encoder layers": {
        "document_reset_mask": True,
        "final_norm": False,
        "encoder_layers": 3,
        "retro_layers_1based": [1],
    },
    "heads wider than the model, LayerNorm1p, tanh GELU, one encoder layer": {
        **ROTARY,
        "head_dim": 16,
        "zero_centered_gamma": True,
        "activation": "gelu_tanh",
        "encoder_layers": 1,
        "rotary_percent": 0.25,
    },
    "a row shorter than a chunk, retrieved length of one chunk": {"sequence_length": 5, "retrieved_length": 8},
    "the other residual": {**ROTARY, **GATED, **UNNORMED, "norm_epsilon": 1e-3},
    "GPT with grouped queries": {
        **ROTARY,
        **GATED,
        "retro_layers_1based": [],
        "num_heads": 4,
        "num_query_groups": 2,
        "tied_embeddings": False,
        "rotary_base": 500.0,
    },
}
ALWAYS = list(SHAPES)[1:2]


def random_tensors(settings: dict[str, Any], theirs: Format) -> dict[str, np.ndarray]:
    """Tensors in a format's names, none of them trivial."""
    random, config = np.random.default_rng(1), config_of_settings(settings)
    tensors = {}
    for name, shape in shapes_there(entries(config, theirs), shapes_of(config)).items():
        spread = 0.3 if len(shape) == 1 else 1.2 / np.sqrt(shape[-1])
        one = name.endswith("norm.weight") and not settings["zero_centered_gamma"]
        tensors[name] = (spread * random.standard_normal(shape) + one).astype(np.float32)
    return tensors


@pytest.mark.parametrize("name", ["mcore_gpt_stock", "mcore_instruct"])
def test_what_is_written_out_by_hand_is_the_original(name: str) -> None:
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    params = {key.removeprefix("param/"): array for key, array in arrays.items() if key.startswith("param/")}
    logits = logits_by_hand(json.loads(arrays["meta_json"].tobytes())["resolved"], params, arrays)
    np.testing.assert_allclose(logits, arrays["f64/logits"], atol=1e-6)  # rotary tables differ in their last bit


@pytest.mark.parametrize("shape", [pytest.param(s, marks=[] if s in ALWAYS else pytest.mark.slow) for s in SHAPES])
def test_other_shapes_pass(shape: str, tmp_path: Path) -> None:
    settings = SETTINGS | SHAPES[shape]
    arrays = make_fixture(settings, random_tensors(settings, CORE))
    np.savez(tmp_path / "fixture.npz", **arrays)
    assert main([str(tmp_path / "fixture.npz")]) == 0


@pytest.mark.slow
def test_legacy_names_pass_and_a_mistake_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = SETTINGS | SHAPES["the other residual"]
    arrays = make_fixture(settings, random_tensors(settings, CORE))
    config, params = config_of_settings(settings), {}
    for core, legacy in zip(entries(config, CORE), entries(config, LEGACY), strict=True):
        assert core.ours == legacy.ours
        params |= {f"param/{new}": arrays.pop(f"param/{old}") for old, new in zip(core.theirs, legacy.theirs, strict=True)}
    path = tmp_path / "legacy.npz"
    np.savez(path, **{**arrays, **params, "meta_json": meta_json(settings | {"family": "megatron-legacy"})})
    assert main([str(path)]) == 0
    np.savez(path, **{**arrays, **params, "meta_json": meta_json(settings | {"family": "megatron-legacy", "norm_epsilon": 1e-5})})
    capsys.readouterr()
    assert main([str(path)]) == 1
    assert capsys.readouterr().out.startswith("FAIL legacy float32: logits")


def test_an_unknown_tensor_is_not_left_out(tmp_path: Path) -> None:
    arrays = make_fixture(SETTINGS, random_tensors(SETTINGS, CORE))
    path = tmp_path / "fixture.npz"
    np.savez(path, **arrays, **{"param/decoder.layers.0.mlp.linear_fc3.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(ValueError, match="no place for"):
        main([str(path)])
    assert read_fixture(path).config == config_of_settings(SETTINGS)
