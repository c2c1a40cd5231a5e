"""Operations that keep their arguments: values and gradients are those of the plain form, and nothing else is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from retro_jax.kernels.saved import where_kept
from retro_jax.model.cca import _convolved, causal_convolution
from retro_jax.model.layers import _activated, _normalised, activate, dropout, normalise, numbered
from tests.planning.traced import saved_by

RANDOM = np.random.default_rng(0)
NORMS = ("layernorm", "layernorm1p", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "squared_relu", "swiglu")
Case = tuple[Callable[..., jax.Array], Callable[..., jax.Array], tuple[Any, ...]]


def array(*shape: int, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(RANDOM.standard_normal(shape), dtype)


def case(name: str, dtype: Any) -> Case:
    """(the function, its plain form, arguments)."""
    if name in NORMS:
        bias = None if name == "rmsnorm" else array(8, dtype=dtype)
        arguments = (3.0 * array(2, 6, 8, dtype=dtype) + 1.0, array(8, dtype=dtype), bias)
        return partial(normalise, kind=name, eps=1e-5), partial(_normalised, kind=name, eps=1e-5), arguments
    if name == "convolution":
        segments = (jnp.asarray([[1, 1, 2, 2, 2, 3]] * 2), jnp.asarray([[1, 1]] * 2))
        arguments = (array(2, 6, 8, dtype=dtype), array(3, 8, dtype=dtype), array(2, 2, 8, dtype=dtype))
        return partial(causal_convolution, segments=segments), partial(_convolved, segments=segments), arguments
    if name == "where":
        keep = jnp.asarray(RANDOM.random((2, 6, 1)) < 0.5)
        x = array(2, 6, 8, dtype=dtype)
        return partial(where_kept, keep=keep, rate=0.3), lambda x: jnp.where(keep, x / (1.0 - 0.3), jnp.zeros_like(x)), (x,)
    x = array(2, 6, 2, 8, dtype=dtype)
    return partial(activate, kind=name), partial(_activated, kind=name), (x,)


def value_and_gradients(function: Callable[..., jax.Array], arguments: tuple[Any, ...]) -> list[jax.Array]:
    value, pull = jax.vjp(function, *arguments)
    weights = jnp.cos(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape).astype(value.dtype)
    return [value, *jax.tree.leaves(pull(weights))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", [*NORMS, *ACTIVATIONS, "convolution", "where"])
def test_values_and_gradients_are_those_of_the_plain_form(name: str, dtype: str) -> None:
    """Bit for bit, but for dropout's division, which a compiler may turn into a product."""
    rtol = 4.0 * float(jnp.finfo(dtype).eps) if name == "where" else 0.0  # measured 1
    with jax.enable_x64(dtype == "float64"):
        function, plain, arguments = case(name, jnp.dtype(dtype))
        got, expected = value_and_gradients(function, arguments), value_and_gradients(plain, arguments)
        assert len(got) == len(expected) == 1 + len(jax.tree.leaves(arguments))
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype == jnp.dtype(dtype)
            np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol)


@pytest.mark.parametrize("name", ["layernorm1p", "swiglu", "convolution", "where"])
def test_they_run_wherever_the_model_does(name: str) -> None:
    """Compiled, mapped, scanned, recomputed under a policy and divided over devices, within float32's rounding."""
    function, _, arguments = case(name, jnp.float32)

    def recomputed(*arguments: Any) -> jax.Array:
        return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names("none"))(*arguments)

    def mapped(*arguments: Any) -> jax.Array:
        return jax.vmap(function)(*jax.tree.map(lambda a: jnp.stack([a, a]), arguments)).mean(0)

    def scanned(*arguments: Any) -> jax.Array:
        first = jnp.zeros_like(arguments[0] if name != "swiglu" else arguments[0][..., 0, :])
        return jax.lax.scan(lambda total, _: (total + function(*arguments) / 2.0, None), first, length=2)[0]

    expected = jax.jit(partial(value_and_gradients, function))(arguments)
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    run = partial(value_and_gradients, function)
    results = [jax.jit(partial(value_and_gradients, other))(arguments) for other in (recomputed, mapped, scanned)]
    results.append(jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))(arguments))
    for result in results:
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-6, rtol=1e-5)  # measured 5e-7


@pytest.mark.parametrize("name", [*NORMS, *ACTIVATIONS, "convolution"])
def test_arguments_alone_are_kept(name: str) -> None:
    function, plain, arguments = case(name, jnp.bfloat16)
    assert saved_by(function, *arguments) == 0
    if name != "relu":
        assert saved_by(plain, *arguments) > 0


def test_dropout_keeps_one_byte_a_number() -> None:
    x, key = array(2, 6, 8, dtype=jnp.bfloat16), jax.random.key(0)
    noise = numbered(key, jnp.arange(12, dtype=jnp.uint32).reshape(2, 6))
    assert saved_by(lambda x: dropout(x, 0.3, noise), x) == x.size


def test_a_compiler_does_not_keep_what_is_computed_again() -> None:
    """Where no loop stands between forward and backward pass: without a barrier XLA takes what it has computed before."""

    def workspace(function: Callable[[jax.Array], jax.Array]) -> int:
        def layers(x: jax.Array, w: jax.Array) -> jax.Array:
            for _ in range(6):
                x = function(x @ w)
            return x.sum()

        x, w = jax.ShapeDtypeStruct((512, 256), jnp.float32), jax.ShapeDtypeStruct((256, 256), jnp.float32)
        memory = jax.jit(jax.grad(layers, argnums=1)).lower(x, w).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes // (512 * 256 * 4)

    kept, plain = workspace(partial(activate, kind="gelu")), workspace(partial(_activated, kind="gelu"))
    # Of each layer the product's operand and the activation's; what lives for a moment beside.
    assert kept < plain and kept <= 6 * 2 + 3, (kept, plain)
