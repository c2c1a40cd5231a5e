"""Operations and bytes counted in a traced program, against counts by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from retro_jax.config import MeshConfig
from retro_jax.planning.program import collectives, product_flops
from retro_jax.training.flops import train_flops
from tests.parallel.build import B, C, K, L, R, T, abstract_state, batch, model_config, prepared, program
from tests.planning.traced import saved_by


def test_a_scan_counts_as_often_as_it_runs() -> None:
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]

    x, w = jnp.ones((3, 4)), jnp.ones((5, 4, 4))
    assert product_flops(jax.make_jaxpr(run)(x, w)) == 5 * 2 * 3 * 4 * 4
    assert collectives(jax.make_jaxpr(run)(x, w)) == []
    # Each step keeps what it was given and the sine's derivative; w is given anyway.
    assert saved_by(run, x, w) == 5 * 3 * 4 * 4 + 5 * 3 * 4 * 4


def test_a_loop_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown number of times"):
        product_flops(jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x))(0))


@pytest.mark.parametrize("form", ["gpt", "retro"])
def test_the_steps_products_are_those_of_the_formula(form: str) -> None:
    """But for the scores, which attention's backward pass computes a second time."""
    model = model_config(form)
    pairs = B * T * T * model.num_layers
    if form == "retro":
        pairs += 2 * B * T * K * R  # two CCA layers
        pairs += B * L * K * R * R + B * L * K * R * C  # one conditioned encoder layer
    scores = 2 * pairs * model.num_heads * model.heads_dim
    assert product_flops(program(model)) == train_flops(model, rows=B, seq_len=T, neighbours=K) + scores


def test_tensor_parallel_devices_divide_the_products() -> None:
    model = model_config("gpt", num_kv_heads=None)
    assert product_flops(program(model, MeshConfig(tensor=4))) * 4 == product_flops(program(model))


def test_recomputation_costs_what_it_says() -> None:
    """Selective: no product of a GPT twice; full: the forward pass of every layer but its last product."""
    none, selective, full = (
        product_flops(program(model_config("gpt", recompute=policy, num_kv_heads=None)))
        for policy in ("none", "selective", "full")
    )
    assert selective == none
    model = model_config("gpt", num_kv_heads=None)
    layer = 2 * B * T * (4 * model.width**2 + 2 * model.ffn_width * model.width) + 4 * B * T * T * model.width
    assert full - none == model.num_layers * layer


def test_saved_bytes_a_layer_are_those_of_the_named_arrays() -> None:
    """Exactly, a layer and policy: float32, tokens x the widths of what is named."""

    def a_layer(policy: str, *exceptions: str) -> int:
        def all_layers(count: int) -> int:
            model = model_config("gpt", recompute=policy, recompute_names=exceptions, num_layers=count)
            form, optimizer = prepared(model)
            params = abstract_state(form, optimizer).params
            return saved_by(lambda params: jnp.sum(form.merge(params, {})(batch())), params)

        assert all_layers(6) - all_layers(4) == all_layers(4) - all_layers(2)
        return (all_layers(4) - all_layers(2)) // 2

    model = model_config("gpt")
    tokens, D, F = 4 * B * T, model.width, model.ffn_width
    heads, groups = model.num_heads * model.heads_dim, model.kv_heads * model.heads_dim
    assert a_layer("full") == tokens * D  # the stream between layers
    named = tokens * (D + D + heads + 2 * groups + heads + model.num_heads + D + D + 2 * F)
    assert a_layer("selective") == named
    assert a_layer("selective", "ffn_up=recompute") == named - tokens * 2 * F
    assert a_layer("none") > named
