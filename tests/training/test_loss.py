"""The chunked loss against the plain one, values, gradients and memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from retro_jax.config import MeshConfig
from retro_jax.parallel.layout import make_layout
from retro_jax.training.loss import loss_and_cross_entropy, token_losses, weighted_loss

# (B, T, D, V, chunk): one chunk, even chunks, a remainder, chunks of one token.
SHAPES = [(2, 8, 4, 11, 100), (2, 8, 4, 11, 4), (3, 7, 5, 13, 4), (1, 5, 3, 7, 1), (2, 9, 4, 300, 17)]


def arrays(B: int, T: int, D: int, V: int, scale: float = 1.0) -> tuple[jax.Array, ...]:
    random = np.random.default_rng(B * T * V)
    hidden, table = random.normal(size=(B, T, D)) * scale, random.normal(size=(V, D))
    return (
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(table, jnp.float32),
        jnp.asarray(random.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(random.random((B, T)) * (random.random((B, T)) < 0.8), jnp.float32),
    )


def exact(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses, and the gradients of their weighted sum, in float64 by their definition."""
    h, w, g = (np.asarray(a, np.float64) for a in (hidden, table, weights))
    z = h @ w.T
    z -= z.max(-1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    one = np.eye(w.shape[0])[np.asarray(targets)]
    d = (p - one) * g[..., None]
    return np.log(np.exp(z).sum(-1)) - (z * one).sum(-1), d @ w, np.einsum("btv,btd->vd", d, h)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["token_losses", "weighted_loss"])
def test_values_and_gradients_are_those_of_the_definition(shape: tuple[int, ...], form: str) -> None:
    hidden, table, targets, weights = arrays(*shape[:4])

    def total(hidden: jax.Array, table: jax.Array) -> jax.Array:
        if form == "weighted_loss":
            return 3.0 * weighted_loss(hidden, table, targets, weights, chunk=shape[4])
        return 3.0 * jnp.sum(token_losses(hidden, table, targets, chunk=shape[4]) * weights)

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, table)
    losses, *expected = exact(hidden, table, targets, weights)
    # Measured: 3e-7 relative for the value, 2e-6 absolute for gradients of size 1.
    np.testing.assert_allclose(value, 3.0 * (losses * np.asarray(weights)).sum(), rtol=2e-6)
    for gradient, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, 3.0 * want, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(token_losses(hidden, table, targets, chunk=shape[4]), losses, rtol=2e-6, atol=2e-6)


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    hidden, table, targets, weights = arrays(2, 8, 4, 11, scale=1e4)
    losses = token_losses(hidden, table, targets, chunk=3)
    expected = exact(hidden, table, targets, weights)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=2e-2)  # float32 logits of 3e4 are 2e-3 apart; measured 4e-3
    gradient = jax.grad(lambda h: weighted_loss(h, table, targets, weights, chunk=3))(hidden)
    assert np.isfinite(gradient).all()


def test_masked_tokens_have_no_gradient() -> None:
    hidden, table, targets, weights = arrays(2, 9, 4, 30)
    weights = weights.at[0].set(0.0)
    gradient = jax.grad(lambda h: weighted_loss(h, table, targets, weights, chunk=4))(hidden)
    assert (np.asarray(gradient[0]) == 0).all() and (np.asarray(gradient[1])[np.asarray(weights[1]) > 0] != 0).any()


@pytest.mark.parametrize("chunk", [1000, 100])
def test_bfloat16_loses_no_more_than_the_plain_form_in_bfloat16(chunk: int) -> None:
    B, T, D, V = 4, 64, 32, 500
    hidden, table, targets, weights = arrays(B, T, D, V)
    hidden = hidden.astype(jnp.bfloat16)
    table16 = table.astype(jnp.bfloat16)
    losses, dhidden, dtable = exact(hidden, table16, targets, weights)

    def plain(hidden: jax.Array, table: jax.Array) -> jax.Array:
        logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, -1) - picked) * weights)

    def error(function: Callable, table: jax.Array) -> tuple[float, float, float]:
        value, (dh, dw) = jax.jit(jax.value_and_grad(function, (0, 1)))(hidden, table)
        total = (losses * np.asarray(weights, np.float64)).sum()
        return (
            abs(float(value) - total) / total,
            float(np.abs(np.asarray(dh, np.float64) - dhidden).max()),
            float(np.abs(np.asarray(dw, np.float64) - dtable).max()),
        )

    ours = error(lambda h, w: weighted_loss(h, w, targets, weights, chunk=chunk), table16)
    theirs = error(plain, table16)
    assert ours[0] <= 1e-6
    assert ours[1] <= 3 * theirs[1] and ours[2] <= 3 * theirs[2], (ours, theirs)


def test_the_table_gradient_of_a_float32_table_is_summed_and_returned_in_float32() -> None:
    hidden, table, targets, weights = arrays(4, 64, 32, 500)
    hidden, table = hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16).astype(jnp.float32)
    dtable = jax.grad(lambda w: weighted_loss(hidden, w, targets, weights, chunk=10))(table)
    want = exact(hidden, table, targets, weights)[2]
    assert dtable.dtype == jnp.float32
    # What is left is the rounding of each logit's gradient to bfloat16 (2^-9), not of the sum: measured 1.3e-3 of the largest.
    assert np.abs(np.asarray(dtable) - want).max() <= 4e-3 * np.abs(want).max()


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"fsdp": 4}, {"tensor": 4}])
def test_a_mesh_divides_the_loss_and_its_gradients_and_changes_neither(sizes: dict[str, int]) -> None:
    """Of the loss, with its z-term, and of what is reported without it."""
    hidden, table, targets, weights = arrays(4, 8, 8, 12)
    mesh = MeshConfig(**sizes)
    layout = make_layout(mesh)
    assert layout is not None
    tokens, rows = P("fsdp" if mesh.fsdp > 1 else None, "tensor" if mesh.tensor > 1 else None), P(*layout.batch.tokens)
    of_table = layout.parameter(("vocab", "width"), table.shape)

    def both(h: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, cross_entropy = loss_and_cross_entropy(h, w, targets, weights, chunk=5, z_loss=0.1)
        return 3.0 * loss, cross_entropy

    def part(h: jax.Array, w: jax.Array, *known: jax.Array) -> tuple:
        (loss, reported), (dh, dw) = jax.value_and_grad(both, (0, 1), has_aux=True)(h, w, *known)
        losses = token_losses(h, w, known[0], chunk=5)
        return layout.sum_over_batch((loss, reported)), losses, dh, layout.sum_gradients([dw], [of_table])[0]

    run = jax.jit(layout.run(part, (P(*tokens, None), of_table, rows, rows), ((P(), P()), rows, P(*tokens, None), of_table)))
    given = [jax.device_put(a, layout.sharding(s)) for a, s in ((hidden, P(*tokens, None)), (table, of_table))]
    known = [jax.device_put(a, layout.sharding(rows)) for a in (targets, weights)]
    sums, losses, dhidden, dtable = run(*given, *known)
    expected = jax.jit(jax.value_and_grad(both, (0, 1), has_aux=True))(hidden, table, targets, weights)
    np.testing.assert_allclose(losses, token_losses(hidden, table, targets, chunk=5), rtol=2e-6)
    for ours, alone in zip(jax.tree.leaves((sums, (dhidden, dtable))), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=2e-5, atol=5e-6)


def residual_bytes(function: Callable, *arguments: jax.Array) -> int:
    """Bytes that the forward pass keeps for the backward pass, the arguments themselves not counted."""
    backward = jax.vjp(function, *arguments)[1]
    own = {argument.unsafe_buffer_pointer() for argument in arguments}
    kept = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.tree.leaves(backward) if isinstance(leaf, jax.Array)}
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_memory_is_a_fraction_of_the_logits() -> None:
    B, T, D, V, chunk = 2, 256, 16, 4096, 32
    hidden, table, targets, weights = arrays(B, T, D, V)
    logits = 4 * B * T * V

    def weighted(h: jax.Array, w: jax.Array) -> jax.Array:
        return weighted_loss(h, w, targets, weights, chunk=chunk)

    def summed(h: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(token_losses(h, w, targets, chunk=chunk) * weights)

    def plain(h: jax.Array, w: jax.Array) -> jax.Array:
        z = h @ w.T
        return jnp.sum((jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, targets[..., None], -1)[..., 0]) * weights)

    assert residual_bytes(weighted, hidden, table) <= 4 * (B * T * D + V * D) + 64
    assert residual_bytes(summed, hidden, table) <= 4 * (B * T * D + 2 * B * T) + 64
    assert residual_bytes(plain, hidden, table) >= logits
    for function, most in ((weighted, 0.25), (summed, 0.25)):
        program = jax.jit(jax.grad(function, (0, 1))).lower(hidden, table).compile()
        assert program.memory_analysis().temp_size_in_bytes <= most * logits
