"""A conversion takes the memory of a few of the largest tensors, whatever the model's size, and checks all that it reads.

Memory is the peak RSS of a process of its own; of a small model the growth, as most of the process is libraries.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from retro_jax.cli import main
from retro_jax.config import ModelConfig
from retro_jax.errors import UserError
from retro_jax.interop import runs
from retro_jax.interop.checkpoints import open_checkpoint
from retro_jax.interop.files import Fact, NpzSource
from retro_jax.interop.shards import SafetensorsShards
from retro_jax.interop.slots import slots, take
from retro_jax.training import checkpoint
from retro_jax.training.checkpoint import load_model
from tests.interop.synthetic import MIB, Drawn, memory_of, retro, write_retro, write_run
from tests.model.build import small

# MiB of a whole process, which are about 400 before it converts anything.
MAY_TAKE = 1280
# The layer after the last one with CCA is a stack of its own; some stacks are larger than what is stored whole.
SEVERAL_STACKS = dataclasses.replace(retro(192, 7, 96), norm="rmsnorm", activation="swiglu")


def conversions(folder: Path, *, ranks: int = 2) -> dict[str, list[object]]:
    """From ``folder/retro`` and ``folder/run`` to folders beside them."""
    ways = {"retro": ("megatron-core", "--tensor-parallel", ranks), "run": ("retro",)}
    return {
        source: ["--from", source, "--input", folder / source, "--output", folder / f"from-{source}", "--to", *target]
        for source, target in ways.items()
    }


@pytest.mark.slow
def test_memory_is_that_of_some_tensors(tmp_path: Path) -> None:
    """After the conversion of a tiny model, which loads the libraries. Measured: at most 76 MiB of 260."""
    folders = {"tiny": retro(64, 2, 64, cca_every=1), "large": retro(512, 14, 4096, cca_every=1)}
    for name, config in folders.items():
        (tmp_path / name).mkdir()
        write_run(config, tmp_path / name / "run")
    write_retro(folders["large"], tmp_path / "large" / "retro")
    (_, *taken) = memory_of(conversions(tmp_path / "tiny")["run"], *conversions(tmp_path / "large").values())
    growth = [peak - before for before, peak in taken]
    size = Drawn(folders["large"]).nbytes / MIB
    print(f"{size:.0f} MiB, growth " + ", ".join(f"{grown:.0f}" for grown in growth))
    assert max(growth) < size / 2


@pytest.fixture
def much_space(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied after the test, passed or not."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "config"), [("retro", retro(2048, 54, 32_000)), ("run", retro(2048, 18, 16_000))])
def test_a_checkpoint_several_times_larger_than_the_memory(source: str, config: ModelConfig, much_space: Path) -> None:
    """All of the process counts. Measured: 913 MiB of 12,220 (retro), 929 and 1,035 of 4,414 (run)."""
    drawn = Drawn(config)
    (write_retro if source == "retro" else write_run)(config, much_space / source)
    ((_, peak),) = memory_of(conversions(much_space)[source])
    print(f"{source}: {drawn.nbytes / MIB:.0f} MiB, the largest tensor {max(f.nbytes for f in drawn.facts.values()) / MIB:.0f}")
    print(f"peak {peak:.0f} MiB")
    assert peak < MAY_TAKE < drawn.nbytes / MIB / 3
    target = "megatron-core" if source == "retro" else "retro"
    written = open_checkpoint(target, much_space / f"from-{source}", config)
    for name in ("embedding.table", "decoder.14.cca.key_value.weight", "decoder.17.ffn.up.weight", "final_norm.scale"):
        np.testing.assert_array_equal(written.source.read(name), drawn.read(name))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming") / "run"
    write_run(SEVERAL_STACKS, folder)
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("whole_bytes", [0, checkpoint.WHOLE_BYTES, 2**40])
def test_a_run_is_read_as_its_model_is_loaded(whole_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the stacks are stored: row by row, the large ones so, none (as by earlier versions)."""
    monkeypatch.setattr(checkpoint, "WHOLE_BYTES", whole_bytes)
    write_run(SEVERAL_STACKS, tmp_path / "run")
    model, _ = load_model(tmp_path / "run")
    arrays: dict[Any, Any] = {p: v[...] for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert len({path[1] for path in arrays if path[0] == "decoder"}) > 1
    source = runs.RunSource(tmp_path / "run", "latest")
    assert source.config == SEVERAL_STACKS
    for name, slot in slots(SEVERAL_STACKS).items():
        expected = take(arrays, slot)
        for read in (source.read(name), source.read(name)):  # read twice, a row is still counted once
            assert source.facts[name] == Fact(expected.shape, expected.dtype) and read.dtype == expected.dtype
            np.testing.assert_array_equal(read, expected)
    source.read_the_rest()


def test_layers_of_large_stacks_are_stored_one_by_one(trained: Path) -> None:
    with checkpoint.Checkpoints(trained / "checkpoints", keep=1) as checkpoints:
        found = checkpoints._manager.item_metadata(1)["params"].tree
    stacks = {name: facts for name, facts in found.items() if name.startswith("decoder.") and facts.shape[0] > 1}
    stored = {name: facts.storage.chunk_shape[0] == 1 for name, facts in stacks.items()}
    large = {name: 4 * math.prod(facts.shape) > 2**20 for name, facts in stacks.items()}
    assert stored == large and set(large.values()) == {False, True}


def convert(folder: Path, target: str) -> int:
    return main(["convert", "--from", "run", "--to", target, "--input", str(folder), "--output", str(folder.parent / "out")])


@pytest.mark.parametrize("part", ["middle", "beginning"])
def test_a_flipped_bit_in_a_run_is_refused(part: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = max((copied / "checkpoints" / "1" / "params").rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if part == "middle" else 1000] ^= 0x10
    path.write_bytes(bytes(data))
    assert convert(copied, "retro") == 2
    assert "checkpoints/1 is corrupted" in (told := capsys.readouterr().err) and "delete" in told
    assert [file.name for file in copied.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("target", ["retro", "huggingface"])
@pytest.mark.parametrize("changed", ["ffn.up.weight", "cca.query.weight", "embedding.table"])
def test_numbers_with_another_digest_are_refused(
    target: str, changed: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where every checksum of the format passes, and in parameters that a format leaves out."""
    about = copied / "checkpoints" / "1" / "about" / "metadata"
    told = json.loads(about.read_text())
    name = next(name for name in told["digests"] if name.endswith(changed))
    told["digests"][name] += 1
    about.write_text(json.dumps(told))
    assert convert(copied, target) == 2
    assert f"is corrupted (the numbers of {name} have changed); no earlier one is good" in capsys.readouterr().err
    assert [file.name for file in copied.parent.iterdir()] == ["run"]


def test_a_run_that_is_not_there(trained: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint 5 in .*: there are 1"):
        open_checkpoint("run", trained, None, which="5")
    with pytest.raises(UserError, match="was validated, so none is the best"):
        open_checkpoint("run", trained, None, which="best")
    with pytest.raises(UserError, match="checkpoints is not there; train the model first"):
        open_checkpoint("run", trained / "checkpoints", None)


def test_a_run_of_another_model(copied: Path) -> None:
    about = copied / "checkpoints" / "1" / "about" / "metadata"
    about.write_text(about.read_text().replace('"ffn_dim": 768', '"ffn_dim": 256'))
    with pytest.raises(UserError, match=r"is of another model: decoder.*ffn.* has shape \(.*768.*\) there and has shape"):
        open_checkpoint("run", copied, None)


def test_a_pickle_without_torch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pt").touch()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    with pytest.raises(UserError, match=r"a.pt is a pickle, and torch is not installed"):
        open_checkpoint("megatron-core", tmp_path / "a.pt", small(), pickles=True)


def test_pickles_keep_their_dtype_and_are_mapped_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from retro_jax.interop import pickles

    wanted = {f"{number}.w": torch.randn(5, 3).to(torch.bfloat16).T for number in range(3)} | {"w": torch.randn(4)}
    torch.save({"model": wanted}, tmp_path / "a.pt")
    torch.save({"b": torch.ones(2, requires_grad=True)}, tmp_path / "b.pt")
    monkeypatch.setattr(pickles, "MAPPED_BYTES", 30)
    source = pickles.PickleSource([tmp_path / "a.pt", tmp_path / "b.pt"])
    for name, tensor in wanted.items():
        read = source.read(name)
        dtype = np.dtype(np.float32 if name == "w" else ml_dtypes.bfloat16)
        assert source.facts[name] == Fact(tuple(tensor.shape), dtype) and read.dtype == dtype
        np.testing.assert_array_equal(read.astype(np.float32), tensor.float().numpy())
    assert source.read("b").tolist() == [1, 1]
    torch.save({"q": torch.ones(2).to(torch.float8_e5m2)}, tmp_path / "q.pt")
    with pytest.raises(UserError, match=r"q in .*q.pt is of dtype torch.float8_e5m2, which NumPy lacks"):
        pickles.PickleSource([tmp_path / "q.pt"])


def test_of_an_archive_only_headers_are_read_at_first(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6e4).reshape(2, -1), "b": np.float32(3), "c": np.asfortranarray(np.eye(4, 5, dtype=np.float16))}
    np.savez(tmp_path / "good.npz", **arrays)  # type: ignore[arg-type]
    np.savez(tmp_path / "broken.npz", **arrays)  # type: ignore[arg-type]
    data = (tmp_path / "broken.npz").read_bytes()
    (tmp_path / "broken.npz").write_bytes(data.replace(arrays["a"].tobytes(), bytes(arrays["a"].nbytes)))
    for name in ("good", "broken"):
        source = NpzSource(tmp_path / f"{name}.npz")
        assert source.facts == {name: Fact(array.shape, array.dtype) for name, array in arrays.items()}
        assert all(np.array_equal(source.read(name), arrays[name]) for name in "bc")
    assert np.array_equal(NpzSource(tmp_path / "good.npz").read("a"), arrays["a"])
    with pytest.raises(UserError, match="broken.npz cannot be read as a NumPy archive .*CRC"):
        source.read("a")
    (tmp_path / "none.npz").write_bytes(data[:-30])
    with pytest.raises(UserError, match="truncated or corrupted"):
        NpzSource(tmp_path / "none.npz")


def test_files_are_safetensors_whatever_is_in_them(tmp_path: Path) -> None:
    """Dtypes of all sizes, each tensor at a multiple of its own, in files that hold nothing else."""
    torch = pytest.importorskip("torch")
    tensors = {
        "odd": np.arange(3).astype(ml_dtypes.bfloat16),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((0, 4), np.float32),
        "bytes": np.arange(5, dtype=np.uint8),
        "half": np.ones((3, 1), np.float16),
    }
    shards = SafetensorsShards(tmp_path, {name: Fact(tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    for name in reversed(tensors):
        shards.write(name, tensors[name])
    shards.finish()
    (file,) = tmp_path.iterdir()
    length, data = struct.unpack("<Q", file.read_bytes()[:8])[0], file.read_bytes()
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"} and length % 8 == 0
    assert len(data) == 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())
    from safetensors.torch import load_file as load_for_torch

    read, for_torch = load_file(file), load_for_torch(file)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        np.testing.assert_array_equal(read[name], tensor)
        np.testing.assert_array_equal(for_torch[name].to(torch.float64).numpy(), tensor.astype(np.float64))
