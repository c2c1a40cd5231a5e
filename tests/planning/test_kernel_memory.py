"""Temporary memory of the operations in XLA's program for an H100 that need not be there: it grows with the tokens, where a plain
form's grows with tokens times vocabulary, or with the square of the tokens."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from retro_jax.config import MeshConfig
from retro_jax.kernels.attention import CausalMask, attention
from retro_jax.kernels.choice import lowering_for_gpu
from retro_jax.kernels.chunked_cross_attention import chunked_cross_attention
from retro_jax.kernels.linear_cross_entropy import weighted_loss
from retro_jax.planning.compiled import described_mesh
from retro_jax.planning.target import TARGETS
from tests.planning.test_compiled import cuda

H100 = TARGETS["h100"]
IMPLEMENTATIONS = ("xla", "triton")
CHUNK, KEYS, HEADS, HEAD = 64, 256, 16, 128


def temporary(function: Callable, *arguments: tuple[tuple[int, ...], jnp.dtype]) -> int:
    """Bytes of an H100 that the program takes beside its arguments and results."""
    device = SingleDeviceSharding(described_mesh(MeshConfig(), H100).devices.flat[0])
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=device) for shape, dtype in arguments]
    with lowering_for_gpu(10 * H100.capability):
        memory = jax.jit(function).lower(*given).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@cuda
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_loss_takes_an_eighth_of_logits_and_gradient(implementation: str) -> None:
    """Its float32 logits would be 4 GiB, and their gradient as much; measured 644 MiB, 512 the table's float32 gradient."""
    width, vocabulary, chunk = 2048, 65536, 1024

    def step(hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        loss = jax.value_and_grad(weighted_loss, (0, 1))
        return loss(hidden, table, targets, weights, chunk=chunk, implementation=implementation)

    def bytes_of(tokens: int) -> int:
        rows = ((tokens, width), jnp.bfloat16), ((vocabulary, width), jnp.bfloat16)
        return temporary(step, *rows, ((tokens,), jnp.int32), ((tokens,), jnp.float32))

    few, many = bytes_of(8192), bytes_of(16384)
    assert many - few <= 4 * 8192 * width * 2
    assert many <= 2 * 4 * 16384 * vocabulary / 8


@cuda
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunked_cross_attention_is_linear_in_tokens(implementation: str) -> None:
    """8,192 tokens: measured 354 MiB in XLA, 33 in Triton."""

    def step(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        def forward(*arrays: jax.Array) -> jax.Array:
            return chunked_cross_attention(*arrays, mask, chunk_len=CHUNK, implementation=implementation)

        return jax.vjp(forward, q, k, v)[1](do)

    def bytes_of(tokens: int) -> int:
        rows, chunks = ((1, tokens, HEADS, HEAD), jnp.bfloat16), (1, tokens // CHUNK, KEYS)
        keys = ((*chunks, HEADS, HEAD), jnp.bfloat16)
        return temporary(step, rows, keys, keys, (chunks, jnp.bool), rows)

    few, many = bytes_of(4096), bytes_of(8192)
    assert many <= 2.05 * few


@cuda
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal_attention_is_linear_in_tokens(implementation: str) -> None:
    """8,192 tokens: measured 1,001 MiB in XLA, 1 in Triton; the weights alone would be 4 GiB."""

    def step(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        mask = CausalMask(segments, segments)
        return jax.vjp(lambda *arrays: attention(*arrays, mask, implementation=implementation), q, k, v)[1](do)

    def bytes_of(tokens: int) -> int:
        rows = ((1, tokens, HEADS, HEAD), jnp.bfloat16)
        return temporary(step, rows, rows, rows, ((1, tokens), jnp.int32), rows)

    few, many = bytes_of(4096), bytes_of(8192)
    assert many <= 2.05 * few
