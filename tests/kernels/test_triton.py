"""Triton's kernels, run by its interpreter, against the reference: float32 and float16, over the shapes of ``shapes.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr
from jax.sharding import PartitionSpec as P

from benchmarks.step_time import random_rows
from retro_jax.config import ChunkConfig, EncoderConfig, ModelConfig, RetroConfig
from retro_jax.kernels.attention import CausalMask, attention
from retro_jax.kernels.attention import shapes as attention_shapes
from retro_jax.kernels.chunked_cross_attention import chunked_cross_attention, shapes
from retro_jax.model import Retro
from retro_jax.planning.program import inner_jaxprs
from retro_jax.training.loss import weighted_loss
from retro_jax.training.state import model_form
from tests.kernels import test_attention as of_attention
from tests.kernels import test_chunked_cross_attention as of_cca
from tests.kernels.interpreter import interpreted
from tests.kernels.tolerance import assert_as_good_as, widened

NAMES = ("q", "k", "v", "null")


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    with interpreted("chunked_cross_attention.triton", "attention.triton", "linear_cross_entropy.triton"):
        yield


def quick_first(*quick, slow) -> list:
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


def hold(run, arrays, do) -> None:
    """``run`` as Triton and plainly in the same dtype, against the reference in float64; what the reference does in float32 is
    plain, and what the XLA form does in float16. NumPy, with which the interpreter computes, sums less exactly than XLA."""

    @partial(jax.jit, static_argnums=0)
    def results(implementation, arrays, do):
        o, vjp = jax.vjp(lambda *arrays: run(implementation, *arrays), *arrays)
        return o, vjp(do)

    ours = results("triton", arrays, do)
    with jax.enable_x64(True):
        wide = widened((*arrays, do))
        exact = results("reference", wide[:-1], wide[-1])
    plain = results("reference" if do.dtype == jnp.float32 else "xla", arrays, do)
    # What float32 rounds the largest of the numbers by that are summed.
    least = np.finfo(np.float32).eps / 2 * max(float(jnp.abs(array).max()) for array in (*arrays, do) if array is not None)
    assert_as_good_as(ours[0], plain[0], exact[0], factor=2.0, name="o", least=least)
    for name, array, a, b, c in zip(NAMES[: len(arrays)], arrays, ours[1], plain[1], exact[1], strict=True):
        if array is not None:
            assert a.dtype == array.dtype and a.shape == array.shape
            assert_as_good_as(a, b, c, factor=3.0, name=name, least=least)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    quick_first(
        (shapes.SMALL[0], np.float32),  # remainders, grouped queries
        (shapes.SMALL[4], np.float32),  # many keys: dQ has a kernel of its own
        (shapes.SMALL[1], np.float16),
        slow=[
            *((shape, np.float32) for shape in shapes.SMALL[1:4]),
            (shapes.SMALL[0], np.float16),
            (shapes.SMALL[2], np.float16),
        ],
    ),
)
def test_chunked_cross_attention(shape: shapes.Shape, dtype: type) -> None:
    B, T, L, C, S, N, G, H = shape
    for first, null in ((None if T == L * C else C, False), (np.arange(B, dtype=np.int32) + 2, True), (0, False)):
        arrays, mask, do = of_cca.problem(3, B, T, L, S, N, G, H, null=null, dtype=dtype)

        def run(implementation, q, k, v, null, mask=mask, first=first):
            return chunked_cross_attention(
                q, k, v, jnp.asarray(mask), null, chunk_len=C, first_chunk_len=first, implementation=implementation
            )

        hold(run, arrays, do)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    quick_first(
        (attention_shapes.SMALL[1], np.float32),
        (attention_shapes.SMALL[2], np.float16),
        slow=[(attention_shapes.SMALL[i], dtype) for i, dtype in ((0, np.float32), (2, np.float32), (1, np.float16))],
    ),
)
def test_attention(shape: attention_shapes.Shape, dtype: type) -> None:
    X, Q, S, N, G, H = shape
    for mask in ("causal", "key") if Q == S else ("causal",):
        arrays, who, do = of_attention.problem(4, X, Q, S, N, G, H, mask=mask, null=False, dtype=dtype)

        def run(implementation, q, k, v, null, who=who):
            return attention(q, k, v, who, null, implementation=implementation)

        hold(run, arrays, do)


def test_rows_of_many_documents_and_padding() -> None:
    """Tiles that no query of a tile sees are left out on both sides: documents that end in a tile, and one that spans three."""
    random, X, Q = np.random.default_rng(5), 2, 300
    lengths = np.array([[3, 200, 60, 30], [130, 1, 1, 100]])
    segments = np.stack([np.concatenate([*(np.full(n, i + 1) for i, n in enumerate(row)), np.zeros(Q)])[:Q] for row in lengths])
    who = CausalMask(segments.astype(np.int32), segments.astype(np.int32))
    q, k, v, do = (jnp.asarray(random.standard_normal((X, Q, 2, 16)), jnp.float32) for _ in range(4))
    hold(lambda name, q, k, v: attention(q, k, v, who, implementation=name), (q, k, v), do)


def small_cca(null: bool = True, **keywords):
    """A problem, and the operation of (implementation, q, k, v, null)."""
    B, T, L, C, S, N, G, H = shapes.SMALL[0]
    arrays, mask, do = of_cca.problem(6, B, T, L, S, N, G, H, null=null)

    def run(implementation, q, k, v, null, mask=mask):
        mask_BLS = jnp.asarray(mask)
        return chunked_cross_attention(q, k, v, mask_BLS, null, chunk_len=C, implementation=implementation, **keywords)

    return arrays, do, run


def test_dropout_drops_the_same() -> None:
    arrays, do, run = small_cca(dropout=0.4, dropout_key=jax.random.key(0))
    hold(run, arrays, do)


def test_what_is_absent_is_exactly_zero() -> None:
    arrays, do, run = small_cca()
    o, vjp = jax.vjp(partial(run, "triton"), *arrays)
    dq, dk, dv, _ = vjp(do)
    C = shapes.SMALL[0].C
    assert not np.any(o[:, : C - 1]) and not np.any(dq[:, : C - 1])  # read nothing
    assert not np.any(o[0, C - 1 : 2 * C - 1]) and not np.any(dq[0, C - 1 : 2 * C - 1])  # their chunk has no neighbours
    assert not np.any(dk[0, 0]) and not np.any(dv[0, 0])
    assert np.any(o[1, C - 1 : 2 * C - 1]) and np.any(dk[1, 0])


@pytest.mark.parametrize("axes", [0, (0, None, 0, None)], ids=["all", "some"])
def test_mapped(axes) -> None:
    """triton_call has no batching rule: the mapped axis is folded into the batch, values and gradients of it."""
    arrays, do, run = small_cca()
    two = [jnp.stack([array, 2 * array]) for array in arrays]
    taken = [array if axis == 0 else own for array, own, axis in zip(two, arrays, [0] * 4 if axes == 0 else axes, strict=True)]

    def value_and_gradients(implementation, *arrays):
        o, vjp = jax.vjp(partial(run, implementation), *arrays)
        return o, vjp(do)

    ours, theirs = (jax.jit(jax.vmap(partial(value_and_gradients, name), in_axes=axes))(*taken) for name in ("triton", "xla"))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), ours, theirs)


@pytest.mark.parametrize(("saved", "runs"), [(("cca_out", "cca_lse"), 1), (("cca_out",), 2), ((), 2)])
def test_a_policy_that_names_both_residuals_runs_the_forward_kernel_once(saved, runs) -> None:
    arrays, do, run = small_cca()

    def loss(*arrays):
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        return (jax.checkpoint(partial(run, "triton"), policy=policy)(*arrays) * do).sum()

    step = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    assert kernel_calls(jax.make_jaxpr(step)(*arrays).jaxpr) == runs + 1  # and the backward kernel
    expected = jax.value_and_grad(lambda *arrays: (run("xla", *arrays) * do).sum(), argnums=(0, 1, 2, 3))(*arrays)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), jax.jit(step)(*arrays), expected)


def kernel_calls(jaxpr: Jaxpr) -> int:
    """How many kernels a program launches."""
    inner = sum(kernel_calls(inner) for eqn in jaxpr.eqns for inner in inner_jaxprs(eqn.params))
    return inner + sum(eqn.primitive.name == "pure_callback" for eqn in jaxpr.eqns)


def test_in_a_scan_on_a_mesh() -> None:
    """Rows divided over two devices, two layers scanned; the gradients are those of one device, with no sum over the mesh."""
    arrays, do, run = small_cca(null=False)
    mask = of_cca.problem(6, *shapes.SMALL[0][:3], *shapes.SMALL[0][4:])[1]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def gradients(implementation, q, k, v, mask, do):
        def loss(q, k, v):
            def layer(x, _):
                return x + run(implementation, x, k, v, None, mask), None

            return (jax.lax.scan(layer, q, None, length=2)[0] * do).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    q, k, v, _ = arrays
    expected = jax.jit(partial(gradients, "xla"))(q, k, v, mask, do)
    for check in (False, True):
        part = jax.shard_map(partial(gradients, "triton"), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check)
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), jax.jit(part)(q, k, v, mask, do), expected)


def test_runs_are_equal_to_the_bit() -> None:
    arrays, do, run = small_cca()
    first, second = (jax.vjp(partial(run, "triton"), *arrays) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    jax.tree.map(np.testing.assert_array_equal, first[1](do), second[1](do))


def test_what_triton_cannot_run_is_named() -> None:
    q = jnp.zeros((1, 4, 2, 24))
    with pytest.raises(
        ValueError, match="attention: implementation='triton' cannot run this: head_dim=24 is not a multiple of 16"
    ):
        attention(q, q, q, implementation="triton")
    q = jnp.zeros((1, 4, 2, 16))
    who = CausalMask(jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="dropout of weights and a null logit are not in its causal kernels"):
        attention(q, q, q, who, implementation="triton", dropout=0.1, dropout_key=jax.random.key(0))


def test_the_interpreter_is_wrong_in_bfloat16() -> None:
    """So the kernels are run in float32 and float16 only. Where this fails, it was mended: run bfloat16 too."""
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, 1, 16)), jnp.bfloat16)
    ours, right = (attention(q, q, q, implementation=name).astype(jnp.float32) for name in ("triton", "reference"))
    assert not np.allclose(ours, right, atol=0.05)
    half = q.astype(jnp.float16)
    np.testing.assert_allclose(attention(half, half, half, implementation="triton").astype(jnp.float32), right, atol=0.05)


@pytest.mark.parametrize("policy", [pytest.param("none", marks=pytest.mark.slow), "selective"])
def test_a_whole_model_by_triton_alone(policy: str) -> None:
    """Loss and every gradient of a Retro with grouped queries, RETRO's chunks made small: those of the XLA form."""
    chunks = ChunkConfig(chunk_len=4, num_neighbours=2, retrieved_len=8)
    encoder = EncoderConfig(num_layers=2)
    retro = RetroConfig(chunks=chunks, cca_layers=(2,), encoder=encoder, null_key=0.5)
    model = ModelConfig(
        vocab_size=64, width=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=64, recompute=policy, retro=retro
    )  # fmt: skip
    batch = random_rows(model, 2, 16)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(implementation, params):
        form = model_form(dataclasses.replace(model, implementation=implementation), lambda path: True)

        def loss(params):
            hidden, table = form.merge(params, {})(batch), form.merge(params, {}).output_table_VD()
            return weighted_loss(hidden, table, batch.targets, batch.loss_mask, chunk=16, implementation=implementation)

        return jax.value_and_grad(loss)(params)

    params = model_form(model, lambda path: True).split(Retro(model, key=jax.random.key(0)))[0]
    ours, theirs = (value_and_gradients(name, params) for name in ("triton", "xla"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), ours, theirs)
