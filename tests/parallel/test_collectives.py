"""What devices send each other in a training step is what the design says, exchange by exchange, and nothing else."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from retro_jax.config import MeshConfig, ModelConfig
from retro_jax.planning.program import BACKWARD, FORWARD, collectives
from tests.parallel.build import B, C, K, L, R, model_config, program, with_encoder
from tests.planning.traced import exchanged

# A sub-layer gathers its tokens and sums its result into shares; backwards the share is gathered again, the result's gradient is
# gathered and that of the input summed. A layer has two sub-layers, with CCA (and the encoder's conditioned one) three.
SUB_FORWARD = Counter(all_gather=1, reduce_scatter=1)
SUB_BACKWARD = Counter(all_gather=2, reduce_scatter=1)
LOSS = Counter(pmax=1)


def times(count: int, exchanges: Counter[str]) -> Counter[str]:
    return Counter({name: count * number for name, number in exchanges.items()})


def of(model: ModelConfig, **mesh: int) -> dict[str | None, Counter[str]]:
    """Exchanges forward and backward in the scan over layers, and outside. Sums of gradients and of losses are left out."""
    found = collectives(program(model, MeshConfig(**mesh)))
    exchanges = [e for e in found if e.operation != "psum"]
    return {scan: exchanged(exchanges, scan) for scan in (FORWARD, BACKWARD, None)}


def plain_retro(**model: object) -> ModelConfig:
    """Fixed gate, no convolution: a learned gate's gradient needs what CCA read, a convolution the tokens before."""
    config = model_config("retro", **model)
    assert config.retro is not None
    return dataclasses.replace(config, retro=dataclasses.replace(config.retro, gate=1.0, conv_width=1))


@pytest.mark.parametrize("policy", ["none", "selective"])
def test_a_plain_layer_over_tensor(policy: str) -> None:
    found = of(model_config("gpt", recompute=policy), tensor=2)
    assert found[FORWARD] == times(2, SUB_FORWARD)
    assert found[BACKWARD] == times(2, SUB_BACKWARD)
    embedding = hidden = Counter(all_gather=1, reduce_scatter=1)
    assert found[None] == embedding + hidden + LOSS


def test_saved_whole_inputs_are_not_gathered_again() -> None:
    found = of(
        model_config("gpt", recompute="selective", recompute_names=("attention_gathered=save", "ffn_gathered=save")), tensor=2
    )
    assert found[FORWARD] == found[BACKWARD] == times(2, SUB_FORWARD)


def test_a_layer_computed_again_gathers_once_more_and_not_twice() -> None:
    """All of its forward pass but the last sum, which its gradient does not need."""
    found = of(model_config("gpt", recompute="full"), tensor=2)
    assert found[BACKWARD] == times(2, SUB_BACKWARD) + Counter(reduce_scatter=1)


def test_cca_and_encoder_over_tensor() -> None:
    """The encoder divided by heads."""
    found = of(with_encoder(plain_retro(), division="heads"), tensor=2)
    assert found[FORWARD] == times(3, SUB_FORWARD)
    assert found[BACKWARD] == times(3, SUB_BACKWARD)
    first_cca_layer = encoder_layer = times(3, SUB_FORWARD) + times(3, SUB_BACKWARD)
    pair = Counter(all_gather=1, reduce_scatter=1)
    tokens = neighbours = conditioning = encoded = hidden = pair
    assert found[None] == first_cca_layer + encoder_layer + tokens + neighbours + conditioning + encoded + hidden + LOSS


def test_an_encoder_divided_by_chunks_exchanges_its_weights_alone() -> None:
    """Gathered forward and backward, biases forward only, and gradients in shards. Tokens are where they are computed: embedded
    there, conditioned on states that are there, and gathered once when they are encoded."""
    found = of(with_encoder(plain_retro(), division="chunks"), tensor=2)
    assert found[FORWARD] == times(3, SUB_FORWARD)
    assert found[BACKWARD] == times(3, SUB_BACKWARD)
    first_cca_layer = times(3, SUB_FORWARD) + times(3, SUB_BACKWARD)
    weights, biases = 3 + 3 + 2, 2 + 2 + 1  # of queries, keys with values, and out in two attentions; of the feed-forward
    encoder_layer = Counter(all_gather=2 * weights + biases, reduce_scatter=weights + biases)
    pair = Counter(all_gather=1, reduce_scatter=1)
    tokens = neighbours = encoded = hidden = pair
    assert found[None] == first_cca_layer + encoder_layer + tokens + neighbours + encoded + hidden + LOSS


@pytest.mark.parametrize("division", ["heads", "chunks"])
def test_rows_in_parts_share_what_they_hand_on(division: str) -> None:
    """One chunk's encoded neighbours, of which each device along tensor hands on its part."""
    model = with_encoder(plain_retro(), division=division)
    found = collectives(program(model, MeshConfig(sequence=2, tensor=4)))
    handed = {e.received for e in found if e.operation == "ppermute"}
    assert handed == {B * K * R * model.width * 4 // 4, B * K * R}


def test_rows_in_parts_hand_on_one_chunk_a_step() -> None:
    model, mesh = plain_retro(), MeshConfig(sequence=4)
    found = collectives(program(model, mesh))
    handed = [e for e in found if e.operation == "ppermute"]
    encoded_chunk, mask = B * K * R * model.width * 4, B * K * R
    assert [(e.received, e.times, e.scan) for e in handed] == [
        (mask, 1, None), (encoded_chunk, 1, None), (encoded_chunk, 1, None),
    ]  # fmt: skip
    keys_and_values = [e for e in found if e.scan == FORWARD]
    part = B * L * C // 4 * model.kv_heads * model.heads_dim * 4
    assert [(e.operation, e.axes, e.received) for e in keys_and_values] == 2 * [("all_gather", ("sequence",), 3 * part)]
    assert exchanged(found, BACKWARD) == Counter(reduce_scatter=2)


def test_fsdp_gathers_a_layer_at_a_time() -> None:
    """Five matrices of a layer forward, again backward, and their gradients in shards."""
    for policy in ("none", "selective", "full"):
        found = of(model_config("gpt", recompute=policy), fsdp=2)
        assert found[FORWARD] == Counter(all_gather=5)
        assert found[BACKWARD] == Counter(all_gather=5, reduce_scatter=5)


def test_gradients_are_summed_once_a_step() -> None:
    """However many parts are accumulated, and outside of all scans."""
    model = model_config("gpt")
    for policy in ("none", "full"):
        found = collectives(program(dataclasses.replace(model, recompute=policy), MeshConfig(data=2)))
        assert {(e.operation, e.times, e.scan) for e in found} == {("psum", 1, None)}
