"""What a program holds at its worst moment, against counts by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from retro_jax.planning.peak import ACTIVATIONS, COPY, GRADIENTS, PARAMETERS, WORKSPACE, peak_memory

F4 = 4


def peak(function: Callable, *shapes: tuple[int, ...], kinds: str = "bbbb") -> Counter[str]:
    """Of a function of float32 arrays; ``kinds`` has a letter for each: p for parameters, b for the batch."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    names = [{"p": PARAMETERS, "b": "batch"}[kind] for kind in kinds[: len(shapes)]]
    return Counter({kind: size for kind, size in peak_memory(jax.make_jaxpr(function)(*arguments), names).items() if size})


def test_what_is_computed_element_by_element_is_not_written() -> None:
    assert peak(lambda x: jnp.sum(jnp.sin(x) * 2.0 + x), (64, 64)) == Counter(batch=F4 * 64 * 64, workspace=F4)


def test_what_a_product_reads_is_written_in_the_place_of_what_it_was_computed_from() -> None:
    found = peak(lambda x, w, v: jnp.sum(jnp.maximum(x @ w, 0.0) @ v), (8, 16), (16, 32), (32, 64))
    assert found[WORKSPACE] == F4 * (8 * 32 + 8 * 64)


def test_two_results_of_the_same_operands_exist_together() -> None:
    """As in attention's backward pass: both are written while what they are computed from is there."""

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        y = x @ w
        half, third = (y / 2.0).astype(jnp.bfloat16), (y / 3.0).astype(jnp.bfloat16)
        return jnp.sum(half @ third)

    assert peak(run, (32, 32), (32, 32))[WORKSPACE] == 32 * 32 * (4 + 2 + 2)


def test_a_loop_holds_its_stacks_and_one_body() -> None:
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            y = x @ w
            return jnp.sin(y @ w), y

        x, stack = jax.lax.scan(body, x, None, length=5)
        return jnp.sum(x) + jnp.sum(stack)

    one = F4 * 8 * 8
    # The carry replaces what the loop was given; a body holds two products, of which the last is made the next carry in place.
    assert peak(run, (8, 8), (8, 8))[WORKSPACE] == one + 5 * one + 2 * one


def test_a_step_holds_copies_activations_and_gradients() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        half = w.astype(jnp.bfloat16)
        return jnp.sum((jnp.sin(x.astype(jnp.bfloat16) @ half) @ half).astype(jnp.float32) ** 2)

    found = peak(jax.grad(loss), (16, 16), (64, 16), kinds="pb")
    assert found[PARAMETERS] == F4 * 16 * 16 and found["batch"] == F4 * 64 * 16
    assert found[COPY] == 2 * 16 * 16
    assert found[ACTIVATIONS] > 0 and found[ACTIVATIONS] % (2 * 64 * 16) == 0


def test_accumulated_gradients_are_carried_in_place() -> None:
    def run(w: jax.Array, x: jax.Array) -> jax.Array:
        def loss(w: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(x @ w))

        def part(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return total + jax.grad(loss)(w, x), None

        total, _ = jax.lax.scan(part, jnp.zeros_like(w), x)
        return w - total

    w = F4 * 32 * 32
    two, four = (peak(run, (32, 32), (parts, 8, 32), kinds="pb") for parts in (2, 4))
    assert two[PARAMETERS] == w and two[GRADIENTS] + two[WORKSPACE] >= 2 * w  # the sum, and a part's
    assert four.total() - two.total() == 2 * F4 * 8 * 32  # the batch alone


@pytest.mark.parametrize("width", [16, 48])
def test_results_take_the_place_of_arguments(width: int) -> None:
    assert peak(lambda w: w - 0.5 * w, (width, width), kinds="p") == Counter({PARAMETERS: F4 * width**2})
