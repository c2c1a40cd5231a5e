"""Checkpoints travel both ways bit for bit, and what does not fit is refused by name."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from retro_jax.cli import main
from retro_jax.config import ModelConfig
from retro_jax.errors import UserError
from retro_jax.gin_config import config_text, load_config
from retro_jax.interop.checkpoints import Opened, backbone, open_checkpoint, write_checkpoint
from retro_jax.interop.files import MemorySource, SafetensorsSource, new_folder
from retro_jax.interop.format import OURS, entries
from retro_jax.interop.slots import slots, take
from retro_jax.interop.verify import logits, random_batch, verify
from tests.model.build import gpt, randomised, small

MEGATRON_RETRO = {"cca_positions": "none", "cross_document": True}
MEGATRON_ENCODER = {"num_layers": 2, "positions": "none", "padding": "attended"}
CORE = small(
    num_layers=4, retro={**MEGATRON_RETRO, "cca_layers": (2, 4)}, encoder={**MEGATRON_ENCODER, "cross_residual": "normed"}
)
CORE = dataclasses.replace(CORE, vocab_size=60, num_heads=4)
GATED = {"activation": "swiglu", "linear_bias": False, "norm": "layernorm1p", "rotary_fraction": 0.5, "tied_embedding": False}
LLAMA = gpt(small(num_layers=3, num_heads=4, num_kv_heads=2, norm="rmsnorm", activation="swiglu", linear_bias=False))
GPT2 = gpt(small(num_layers=3, positions="learned", activation="gelu_tanh"))


def opened(config: ModelConfig, seed: int = 0) -> Opened:
    """A model of random numbers."""
    arrays: dict[Any, Any] = {p: v[...] for p, v in nnx.to_flat_state(nnx.state(randomised(config, seed), nnx.Param))}
    named = {name: take(arrays, slot) for name, slot in slots(config).items()}
    return Opened(config, MemorySource(named), entries(config, OURS), [])


def there_and_back(first: Opened, kind: str, folder: Path, **writing: Any) -> Opened:
    with new_folder(folder) as partial:
        write_checkpoint(kind, partial, first, **writing)
    return open_checkpoint(kind, folder, first.config if kind.startswith("megatron") else None)


def assert_same(first: Opened, again: Opened) -> None:
    assert first.config == again.config
    names = slots(first.config)
    for name in names:
        read = again.source.read(name)
        assert read.dtype == first.source.facts[name].dtype and read.shape == names[name].shape
        np.testing.assert_array_equal(read, first.source.read(name), err_msg=name)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("kind", ["megatron-core", "megatron-te", "megatron-legacy"])
@pytest.mark.parametrize("form", ["retro", "gated retro", "gpt"])
def test_megatron(form: str, kind: str, ranks: int, tmp_path: Path) -> None:
    config = CORE if form != "gated retro" else dataclasses.replace(CORE, **GATED)
    if form == "gpt":
        config = dataclasses.replace(gpt(CORE), num_kv_heads=4, positions="learned")
    elif kind == "megatron-legacy":
        config = with_encoder(config, cross_residual="stream")
    first = opened(config)
    assert_same(first, there_and_back(first, kind, tmp_path / "there", ranks=ranks))
    tables = [load_file(path) for path in sorted((tmp_path / "there").glob("mp_rank_*/*.safetensors"))]
    assert len(tables) == ranks
    (embedding,) = (name for name in tables[0] if "word_embeddings" in name)
    assert sum(len(table[embedding]) for table in tables) == (60 if ranks == 1 else 128 * ranks)


def test_a_config_without_a_vocabulary_takes_the_checkpoints(tmp_path: Path) -> None:
    there_and_back(opened(CORE), "megatron-core", tmp_path / "there", ranks=2)
    again = open_checkpoint("megatron-core", tmp_path / "there", dataclasses.replace(CORE, vocab_size=None))
    assert again.config.vocab_size == 256 and not again.source.read("embedding.table")[60:].any()


def test_ranks_that_contradict_each_other(tmp_path: Path) -> None:
    there_and_back(opened(CORE), "megatron-core", tmp_path / "there", ranks=2)
    change(tmp_path / "there" / "mp_rank_01", decoder__final_layernorm__weight=np.zeros(16, np.float32))
    with pytest.raises(UserError, match="the ranks hold different decoder.final_layernorm.weight"):
        open_checkpoint("megatron-core", tmp_path / "there", CORE).source.read("final_norm.scale")
    change(tmp_path / "there" / "mp_rank_01", extra=np.zeros(16, np.float32))
    with pytest.raises(UserError, match="rank 1 and rank 0 do not have the same tensors: extra"):
        open_checkpoint("megatron-core", tmp_path / "there", CORE)


def test_pickles_of_megatron(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nested as the legacy classes save it, with the arguments beside the model; other objects are refused."""
    torch = pytest.importorskip("torch")
    config = with_encoder(CORE, cross_residual="stream")
    first = opened(config)
    there_and_back(first, "megatron-legacy", tmp_path / "there", ranks=2)
    for rank in range(2):
        folder = tmp_path / "there" / f"mp_rank_{rank:02d}"
        nested: dict[str, Any] = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            part, room, rest = name.split(".", 2)
            nested.setdefault(part, {}).setdefault(room, {})[rest] = torch.from_numpy(tensor)
        (folder / "model.safetensors").unlink()
        torch.save({"model": nested, "iteration": 3, "args": argparse.Namespace(num_layers=4)}, folder / "model_optim_rng.pt")
    with pytest.raises(UserError, match="is a pickle; allow it"):
        open_checkpoint("megatron-legacy", tmp_path / "there", config)
    assert_same(first, open_checkpoint("megatron-legacy", tmp_path / "there", config, pickles=True))
    torch.save({"model": nested, "args": tmp_path}, folder / "model_optim_rng.pt")
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        open_checkpoint("megatron-legacy", tmp_path / "there", config, pickles=True)


def with_encoder(config: ModelConfig, **changes: Any) -> ModelConfig:
    assert config.retro is not None
    encoder = dataclasses.replace(config.retro.encoder, **changes)
    return dataclasses.replace(config, retro=dataclasses.replace(config.retro, encoder=encoder))


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        dataclasses.replace(LLAMA, tied_embedding=False, linear_bias=True, rotary_scale=2.0),
        dataclasses.replace(LLAMA, qkv_bias=True, head_dim=6),
        dataclasses.replace(LLAMA, num_kv_heads=4, head_dim=None),
        GPT2,
        dataclasses.replace(GPT2, activation="gelu"),
    ],
    ids=["llama", "llama with biases", "qwen2", "llama without groups", "gpt2", "gpt2 with erf"],
)
def test_hugging_face(config: ModelConfig, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    first = opened(config)
    again = there_and_back(first, "huggingface", tmp_path / "there")
    stated = dataclasses.replace(config, num_kv_heads=config.kv_heads, head_dim=config.heads_dim, max_positions=16)
    if config.positions == "learned":
        stated = dataclasses.replace(config)
    assert_same(dataclasses.replace(first, config=stated), again)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there", attn_implementation="eager").eval()
    batch = random_batch(config)
    with torch.no_grad():
        theirs = model(torch.from_numpy(batch.tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits(config, first.source, batch, None), theirs, atol=2e-5)


def test_the_backbone_is_the_model_with_retrieval_off(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, num_kv_heads=4, retro=small().retro)
    first = opened(config)
    again = there_and_back(backbone(first), "huggingface", tmp_path / "there")
    silent = dataclasses.replace(config, retro=dataclasses.replace(config.retro, gate=0.0))  # type: ignore[type-var]
    batch = random_batch(silent)
    np.testing.assert_array_equal(logits(again.config, again.source, batch, None), logits(silent, first.source, batch, None))


@pytest.mark.parametrize("config", [CORE, small(retro={"null_key": 1.0, "conv_width": 3, "gate": "learned"}), LLAMA])
def test_our_own_files_in_shards(config: ModelConfig, tmp_path: Path) -> None:
    first = opened(config)
    assert_same(first, there_and_back(first, "retro", tmp_path / "there", shard_bytes=4096))
    index = json.loads((tmp_path / "there" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "there").glob("*.safetensors"))) > 2


def test_a_learned_gate_is_folded_into_the_output(tmp_path: Path) -> None:
    config = dataclasses.replace(CORE, retro=dataclasses.replace(CORE.retro, gate="learned"))  # type: ignore[type-var]
    first = opened(config)
    with new_folder(tmp_path / "there") as folder:
        write_checkpoint("megatron-core", folder, first)
    again = open_checkpoint("megatron-core", tmp_path / "there", CORE)
    assert "verified" in verify(first, "retro", tmp_path, "megatron-core", tmp_path / "there", None)
    batch = random_batch(config)
    np.testing.assert_allclose(
        logits(CORE, again.source, batch, None), logits(config, first.source, batch, None), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(dtype: str, tmp_path: Path) -> None:
    first = opened(LLAMA)
    again = there_and_back(first, "retro", tmp_path / "there", dtype=jnp.dtype(dtype))
    for name in slots(LLAMA):
        np.testing.assert_array_equal(again.source.read(name), first.source.read(name).astype(jnp.dtype(dtype)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small(), "EncoderConfig.positions='rotary', only 'none'|RetroConfig.cca_positions='rotary', only 'none'"),
        (with_encoder(CORE, cross_residual="stream"), "EncoderConfig.cross_residual='stream', only 'normed'"),
        (with_encoder(CORE, positions="rotary"), "EncoderConfig.positions='rotary', only 'none'"),
        (dataclasses.replace(CORE, num_kv_heads=2), "ModelConfig.num_kv_heads=2, only 4"),
        (dataclasses.replace(CORE, rotary_scale=2.0), "ModelConfig.rotary_scale=2.0"),
    ],
)
def test_what_megatron_cannot_compute(config: ModelConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message), new_folder(tmp_path / "there") as folder:
        write_checkpoint("megatron-core", folder, opened(config))
    assert list(tmp_path.iterdir()) == []


def test_what_hugging_face_cannot_compute(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, rotary_fraction=0.5)
    with pytest.raises(UserError, match=r"Llama's form needs ModelConfig.rotary_fraction=1.0 \(not 0.5\); GPT-2's form needs"):
        write_checkpoint("huggingface", tmp_path, opened(config))


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    there_and_back(opened(LLAMA), "huggingface", tmp_path / "llama")
    return tmp_path / "llama"


def change(folder: Path, *, drop: str = "", **tensors: Any) -> None:
    file = folder / "model.safetensors"
    held = {name: tensor for name, tensor in load_file(file).items() if name != drop}
    save_file({**held, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}, file)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda folder: change(folder, drop=NORM), f"1 missing: {NORM}"),
        (lambda folder: change(folder, extra=np.zeros(3, np.float32)), "1 unexpected: extra"),
        (lambda folder: change(folder, model__norm__weight=np.zeros(3, np.float32)), r"model.norm.weight (3,), wanted (16,)"),
        (lambda folder: change(folder, model__norm__weight=np.full(16, np.nan, np.float32)), "not finite"),
        (lambda folder: change(folder, lm_head__weight=np.zeros((64, 16), np.float32)), "differs from model.embed_tokens.weight"),
        (lambda folder: (folder / "config.json").unlink(), "it says what the model is"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "has model_type='t5'"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "config.json has no"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" * 60), "truncated or corrupted"),
    ],
)
def test_broken_input(broken: Any, told: str, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken(llama)
    output = llama.parent / "out"
    assert run("--from", "huggingface", "--to", "retro", "--input", llama, "--output", output) == 2
    assert told in capsys.readouterr().err
    assert not output.exists() and sorted(path.name for path in llama.parent.iterdir()) == ["llama"]


def test_a_folder_of_another_format(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--from", "retro", "--to", "huggingface", "--input", llama, "--output", llama.parent / "out") == 2
    assert "is not in our format" in capsys.readouterr().err


def test_a_lost_shard(tmp_path: Path) -> None:
    there_and_back(opened(LLAMA), "retro", tmp_path / "there", shard_bytes=4096)
    sorted((tmp_path / "there").glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match="more tensors of its index"):
        SafetensorsSource(tmp_path / "there")


def test_known_tensors_that_are_no_weights_are_skipped(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(llama, model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(2, np.float32))
    assert run("--from", "huggingface", "--to", "retro", "--input", llama, "--output", llama.parent / "out") == 0
    assert "skipped model.layers.0.self_attn.rotary_emb.inv_freq" in capsys.readouterr().err


def test_commands_from_end_to_end(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "llama.gin"
    config.write_text("".join(f"ModelConfig.{f.name} = {getattr(LLAMA, f.name)!r}\n" for f in dataclasses.fields(LLAMA)))
    assert load_config([config]).model == LLAMA and config_text(load_config([config]))
    core = ["--to", "megatron-core", "--input", llama, "--output", tmp_path / "core", "--tensor-parallel", 2, "--verify"]
    assert run("--from", "huggingface", *core) == 0
    assert "verified: logits as megatron-core read back" in capsys.readouterr().out
    assert run("--from", "huggingface", *core) == 2
    assert "exists; name a folder that does not" in capsys.readouterr().err
    back = ["--from", "megatron-core", "--to", "huggingface", "--input", tmp_path / "core", "--output", tmp_path / "back"]
    assert run(*back) == 2
    assert "needs --config" in capsys.readouterr().err
    assert run(*back, "--config", config, "--report") == 0
    assert "decoder.2.attention.key_value.weight" in capsys.readouterr().out
    first, last = load_file(llama / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert first.keys() == last.keys() and all(np.array_equal(first[name], last[name]) for name in first)


def test_swapped_tensors_are_seen(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retro_jax.interop import command

    write = command.write_checkpoint

    def swapping(kind: str, folder: Path, *arguments: Any, **settings: Any) -> Any:
        written = write(kind, folder, *arguments, **settings)
        held = load_file(folder / "model.safetensors")
        other = NORM.replace("1", "0")
        save_file({**held, NORM: held[other], other: held[NORM]}, folder / "model.safetensors")
        return written

    monkeypatch.setattr(command, "write_checkpoint", swapping)
    arguments = ("--from", "huggingface", "--to", "huggingface", "--input", llama, "--output", tmp_path / "out", "--verify")
    assert run(*arguments) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [LLAMA, CORE], ids=["gpt", "retro"])
def test_the_settings_of_a_checkpoint_are_a_config(
    config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there_and_back(opened(config), "huggingface" if config.retro is None else "retro", tmp_path / "there")
    (tmp_path / "there" / "tokenizer.json").write_text("{}")
    assert main(["settings", str(tmp_path / "there")]) == 0
    (tmp_path / "its.gin").write_text(capsys.readouterr().out)
    (tmp_path / "mine.gin").write_text(
        "include 'its.gin'\nDataConfig.seq_len = 32\nEvalConfig.window = 32\nEvalConfig.stride = 32\n"
    )
    chunks = [] if config.retro else ["ChunkConfig.chunk_len=4", "ChunkConfig.retrieved_len=8"]
    loaded = load_config([tmp_path / "mine.gin"], chunks)
    assert loaded.model == dataclasses.replace(config, head_dim=loaded.model.head_dim) and loaded.model.head_dim in (None, 4)
    assert loaded.training.start_from == str(tmp_path / "there")
    assert loaded.tokenizer.path == str(tmp_path / "there" / "tokenizer.json")


def test_settings_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", str(tmp_path)]) == 2
    assert "holds neither checkpoints/" in capsys.readouterr().err
