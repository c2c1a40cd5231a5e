"""Plans: bytes and operations by hand, what fits, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from retro_jax.cli import main
from retro_jax.config import ChunkConfig, Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import count_parameters
from retro_jax.planning import search
from retro_jax.planning.activations import saved_by_layer, saved_bytes
from retro_jax.planning.command import mesh_of
from retro_jax.planning.plan import make_plan
from retro_jax.planning.report import in_bytes, in_seconds, print_plan
from retro_jax.planning.search import candidates, nearest_that_fits, on_mesh
from retro_jax.planning.target import TARGETS
from retro_jax.training.flops import train_flops

D, F, N, V, LAYERS, B, T = 64, 256, 4, 512, 4, 8, 128
CHUNKS = ChunkConfig(chunk_len=16, num_neighbours=2, retrieved_len=32)


def of(mesh: MeshConfig = MeshConfig(), *, retro: bool = False, **model: object) -> tuple[Config, ModelConfig]:  # noqa: B008
    """A small GPT or Retro without biases."""
    default = {
        "vocab_size": V, "width": D, "num_layers": LAYERS, "num_heads": N, "ffn_dim": F, "linear_bias": False, "norm": "rmsnorm",
        "retro": RetroConfig(chunks=CHUNKS, cca_layers=(2, 4)) if retro else None, "recompute": "selective",
    }  # fmt: skip
    config = ModelConfig(**default | model)  # type: ignore[arg-type]
    data, evaluation = DataConfig(seq_len=T, batch_size=B), EvalConfig(window=T, stride=T)
    return Config(chunks=CHUNKS, model=config, data=data, evaluation=evaluation, mesh=mesh), config


def test_one_device_holds_everything() -> None:
    config, model = of()
    plan = make_plan(config, model)
    parameters = count_parameters(model)
    # Adam's two moments in float32 and its count.
    assert plan.parameters == parameters
    assert plan.memory["parameters"] == 4 * parameters and 0 < plan.memory["compute copy"] <= 2 * parameters
    assert 8 * parameters <= plan.memory["optimizer"] <= 8 * parameters + 16
    assert plan.checkpoint == plan.memory["parameters"] + plan.memory["optimizer"] + 4
    assert plan.exchanges == () and plan.saved["retrieval"] == 0
    assert plan.model_flops == train_flops(model, rows=B, seq_len=T, neighbours=0)
    # Gradients of the hidden states in bfloat16 and of the output table in float32.
    assert plan.saved["loss"] == 2 * B * T * D + 4 * V * D


def test_saved_activations_are_those_of_the_names() -> None:
    """bfloat16: stream, three normed or summed copies, q, k, v, attention's output, feed-forward; log-sum-exp in float32."""
    less, more = (make_plan(*of(num_layers=layers)).saved["decoder"] for layers in (LAYERS, 2 * LAYERS))
    layer = B * T * (2 * (4 * D + 4 * D + F) + 4 * N)
    assert more - less == LAYERS * layer
    assert saved_bytes(saved_by_layer(*of())["plain"]) == layer


@pytest.mark.parametrize("retro", [False, True])
def test_devices_divide_what_one_holds(retro: bool) -> None:
    one = make_plan(*of(retro=retro))
    four = make_plan(*of(MeshConfig(fsdp=2, tensor=2), retro=retro))
    for kind in ("optimizer", "parameters"):
        assert one.memory[kind] / 4 < four.memory[kind] < one.memory[kind] / 3.9, kind  # norms are whole
    assert abs(four.saved["decoder"] / one.saved["decoder"] - 0.25) < 0.01
    assert four.hardware_flops * 4 == one.hardware_flops
    assert four.received("tensor") > 0 and four.received("fsdp") > 0 and four.received("data") == 0
    if retro:
        assert one.saved["retrieval"] > 0
        rows = make_plan(*of(MeshConfig(data=4), retro=True))
        # The first CCA layer's weights, taken out of their stack, are counted on each device.
        assert abs(4 * rows.saved["retrieval"] / one.saved["retrieval"] - 1) < 0.05  # measured 0.02


def test_policies_trade_memory_for_products() -> None:
    plans = [make_plan(*of(recompute=policy)) for policy in ("none", "selective", "full")]
    saved = [plan.saved["decoder"] for plan in plans]
    assert saved == sorted(saved, reverse=True) and len(set(saved)) == 3
    assert plans[0].hardware_flops == plans[1].hardware_flops < plans[2].hardware_flops
    offload = make_plan(*of(recompute="offload"))
    assert offload.offloaded > 0 and offload.offloaded + offload.saved["decoder"] == saved[1]


def test_the_slowest_limit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(*of(MeshConfig(data=2, tensor=4)))
    seconds = plan.seconds(TARGETS["h100"])
    assert set(seconds) == {"products", "memory", "links of tensor", "links of data"}
    assert seconds["products"] == plan.hardware_flops / 989e12
    assert seconds["links of tensor"] == plan.received("tensor") / 450e9
    far = make_plan(*of(MeshConfig(data=4, tensor=4)))
    assert far.seconds(TARGETS["h100"])["links of data"] == far.received("data") / 50e9  # 16 devices are two hosts
    print_plan(plan, TARGETS["h100"], Console(width=120))
    assert f"The limit is {max(seconds, key=seconds.get)}" in " ".join(capsys.readouterr().out.split())  # type: ignore[arg-type]


def test_the_nearest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More recomputation first, then more devices."""
    config, model = of(recompute="none")
    none, full = make_plan(config, model), make_plan(config, dataclasses.replace(model, recompute="full"))
    assert full.total_memory < none.total_memory
    tried: list[object] = []
    target = dataclasses.replace(TARGETS["h100"], memory=float(full.total_memory))
    found = nearest_that_fits(config, model, target, lambda *candidate: tried.append(candidate))
    assert found is not None and found.config.mesh == config.mesh and found.model.recompute == "full" and len(tried) == 3
    target = dataclasses.replace(TARGETS["h100"], memory=full.total_memory / 3)
    config, model = of(recompute="full")
    found = nearest_that_fits(config, model, target, lambda *candidate: None)
    assert found is not None and found.config.mesh.devices in (2, 4, 8) and found.total_memory <= target.memory
    monkeypatch.setattr(search, "MOST_DEVICES", 4)
    assert nearest_that_fits(config, model, dataclasses.replace(target, memory=1.0), lambda *candidate: None) is None


def test_accumulated_parts_hold_a_part_of_the_activations() -> None:
    config, model = of()
    parts = dataclasses.replace(config, training=dataclasses.replace(config.training, accumulate=4))
    one, four = make_plan(config, model), make_plan(parts, model)
    assert 4 * four.saved["decoder"] == one.saved["decoder"]
    assert four.hardware_flops == one.hardware_flops
    assert on_mesh(parts, MeshConfig(data=4)).training.accumulate == 2  # there are 8 rows
    assert on_mesh(parts, MeshConfig(data=8)).training.accumulate == 1


def test_candidates_keep_the_number_of_devices_as_long_as_they_can() -> None:
    config, _ = of(MeshConfig(data=2, tensor=2))
    meshes = [mesh for mesh, _ in candidates(config, TARGETS["h100"])]
    assert meshes[0] == config.mesh
    counts = [mesh.devices for mesh in meshes]
    assert counts == sorted(counts) and counts[0] == 4 and counts[-1] == 4096
    assert all(mesh.sequence == 1 and mesh.tensor <= 8 for mesh in meshes)


def test_the_command_writes_a_table_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--config", "quickstart", "--mesh", "data=2,tensor=2", "--target", "a100"]
    assert main([*arguments, "--json", str(tmp_path / "plan.json"), "--png", str(tmp_path / "plan.png")]) == 0
    told = capsys.readouterr().out
    (plan,) = json.loads((tmp_path / "plan.json").read_text())
    assert "4 x A100 SXM 80 GB (data 2, tensor 2)" in told
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines()]
    assert ["in all, estimated", in_bytes(plan["memory"]["total"])] in rows and ["there is", "74.51 GiB"] in rows, told
    limit = max(plan["seconds"], key=plan["seconds"].get)
    assert f"The limit is {limit}: a step takes {in_seconds(plan['seconds'][limit])} or more" in told
    assert plan["fits"] and plan["mesh"]["tensor"] == 2 and plan["memory"]["total"] < plan["memory"]["target"] == 80e9
    assert {e["scan"] for e in plan["exchanges"]} == {"forward", "backward", None}
    assert all(e["operation"] and e["axes"] and e["received"] > 0 and e["times"] > 0 for e in plan["exchanges"])
    kept = {kind: sum(a["bytes"] for a in arrays if a["action"] == "save") for kind, arrays in plan["layers"].items()}
    assert set(kept) == {"plain", "cca"}  # the quick start's encoder has no layers
    assert sum(kept.values()) < plan["saved"]["decoder"] + plan["saved"]["retrieval"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["tensor", "tensor=x", "depth=2", "data=2;tensor=2"])
def test_a_mesh_that_is_not_written_as_one(text: str) -> None:
    with pytest.raises(UserError, match=r"--mesh has .*; write sizes of data, fsdp, sequence, tensor, as in data=2,tensor=8"):
        mesh_of(text, MeshConfig())


def test_a_mesh_that_does_not_divide_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "quickstart", "--mesh", "tensor=3"]) == 2
    assert "DataConfig.seq_len=256 is not a multiple of MeshConfig.sequence * tensor" in capsys.readouterr().err
