"""Linear cross-entropy: every implementation against the reference, and the reference against autodiff of the formula.

Triton's kernels run in its interpreter, in float32 and float16, and are compiled for A100 and H100.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from retro_jax.kernels import triton_call
from retro_jax.kernels.choice import lowering_for_gpu
from retro_jax.kernels.compiled import report
from retro_jax.kernels.linear_cross_entropy import gradients, loss_and_cross_entropy, token_losses, weighted_loss
from retro_jax.kernels.linear_cross_entropy.shapes import LARGE, SMALL, Shape
from tests.kernels.interpreter import interpreted
from tests.kernels.tolerance import assert_as_good_as, widened

IMPLEMENTATIONS = ("reference", "xla", "triton")
Z_LOSS = 0.1


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    if "implementation" in request.fixturenames and request.getfixturevalue("implementation") == "triton":
        with interpreted("linear_cross_entropy.triton"):
            yield
    else:
        yield


def problem(shape: Shape, dtype: Any = np.float32, *, masked: bool = True) -> tuple[jax.Array, ...]:
    """hidden, table, targets, weights; two tokens of five are masked, one by its target and one by its weight."""
    N, D, V, _ = shape
    random = np.random.default_rng(N * D * V)
    hidden, table = random.standard_normal((N, D)), random.standard_normal((V, D))
    targets, weights = random.integers(0, V, N), 0.5 + random.random(N)
    if masked:
        targets[1::5], weights[3::5] = -1, 0.0
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(table, dtype),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(weights, np.float64 if dtype == np.float64 else np.float32),
    )


def plain_loss(hidden_ND, table_VD, targets_N, weights_N, z_loss=0.0):
    """The formula as one would write it, every step in the arrays' dtype, for autodiff."""
    logits_NV = hidden_ND @ table_VD.T
    return jnp.sum(plain_losses(logits_NV, targets_N, z_loss) * weights_N.astype(hidden_ND.dtype))


def plain_losses(logits_NV, targets_N, z_loss=0.0):
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    target_N = jnp.take_along_axis(logits_NV, jnp.maximum(targets_N, 0)[:, None], axis=-1)[:, 0]
    losses_N = lse_N - target_N + jnp.asarray(z_loss, lse_N.dtype) * lse_N**2
    return jnp.where(targets_N >= 0, losses_N, jnp.zeros_like(losses_N))


# What is compiled once and runs for milliseconds.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(jit, static_argnames=("chunk", "z_loss", "implementation"))
def value_and_gradients(hidden, table, targets, weights, **how):
    return jax.value_and_grad(lambda h, w: weighted_loss(h, w, targets, weights, **how), (0, 1))(hidden, table)


@partial(jit, static_argnames=("chunk", "implementation"))
def losses_and_gradients(hidden, table, targets, weights, **how):
    losses, vjp = jax.vjp(lambda h, w: token_losses(h, w, targets, **how), hidden, table)
    return losses, vjp(weights)


def assert_close(ours: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_value_and_gradients_are_those_of_the_formula_in_float64(implementation, z_loss):
    with jax.enable_x64(True):
        arrays = problem(SMALL[2], np.float64)
        ours = value_and_gradients(*arrays, chunk=SMALL[2].chunk, z_loss=z_loss, implementation=implementation)
        expected = jit(jax.value_and_grad(plain_loss, (0, 1)))(*arrays, z_loss)
        assert ours[0].dtype == ours[1][0].dtype == ours[1][1].dtype == jnp.float64
        assert_close(ours, expected, 1e-13)  # measured 4e-16


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_each_is_the_reference(implementation, shape):
    arrays = problem(shape)
    how = {"chunk": shape.chunk, "z_loss": Z_LOSS}
    ours = value_and_gradients(*arrays, **how, implementation=implementation)
    assert_close(ours, value_and_gradients(*arrays, **how, implementation="reference"), 5e-6)  # measured 6e-7
    ours = losses_and_gradients(*arrays, chunk=shape.chunk, implementation=implementation)
    assert_close(ours, losses_and_gradients(*arrays, chunk=shape.chunk, implementation="reference"), 5e-6)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("xla", np.float32), ("xla", np.float16), ("xla", jnp.bfloat16), ("triton", np.float32), ("triton", np.float16)],
)
def test_error_is_within_that_of_the_same_dtype(implementation, dtype):
    """At most 2 x (forward) and 3 x (backward) the error of a plain computation in the dtype itself."""
    arrays = problem(Shape(60, 32, 1200, 25), dtype)
    ours = losses_and_gradients(*arrays, chunk=25, implementation=implementation)
    assert ours[0].dtype == jnp.float32 and ours[1][0].dtype == ours[1][1].dtype == dtype
    weighted = value_and_gradients(*arrays, chunk=25, z_loss=Z_LOSS, implementation=implementation)
    plain_weighted = jit(jax.value_and_grad(plain_loss, (0, 1)))(*arrays, np.float32(Z_LOSS))
    plain = jit(plain_losses)(arrays[0] @ arrays[1].T, arrays[2])
    with jax.enable_x64(True):
        hidden, table, weights = widened((arrays[0], arrays[1], arrays[3]))
        exact_weighted = jit(jax.value_and_grad(plain_loss, (0, 1)))(hidden, table, arrays[2], weights, Z_LOSS)
        exact = jit(plain_losses)(hidden @ table.T, arrays[2])
    assert_as_good_as(ours[0], plain, exact, factor=2.0, name="losses")
    for number, name in enumerate(("hidden", "table")):
        assert_as_good_as(weighted[1][number], plain_weighted[1][number], exact_weighted[1][number], factor=3.0, name=f"d{name}")
    # Logits rounded to float16 are 2^-11 off, which partly averages out in a sum.
    assert abs(float(weighted[0]) / float(exact_weighted[0]) - 1.0) <= (5e-4 if ours_rounds(implementation, dtype) else 1e-6)


def ours_rounds(implementation, dtype):
    return implementation == "triton" and dtype != np.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_masked_token_adds_nothing_and_gets_exactly_no_gradient(implementation):
    """By its target or by its weight; and however large its logits are."""
    hidden, table, targets, weights = problem(Shape(20, 4, 30, 7))
    masked = np.asarray((targets < 0) | (weights == 0.0))
    assert masked.sum() == 8
    how = {"chunk": 7, "z_loss": Z_LOSS, "implementation": implementation}
    value, (dhidden, dtable) = value_and_gradients(hidden, table, targets, weights, **how)
    assert not np.any(np.asarray(dhidden)[masked]) and np.all(np.any(np.asarray(dhidden)[~masked], axis=1))
    losses = losses_and_gradients(hidden, table, targets, weights, chunk=7, implementation=implementation)[0]
    assert not np.any(np.asarray(losses)[targets < 0]) and np.all(np.asarray(losses)[targets >= 0])
    other = value_and_gradients(jnp.where(masked[:, None], 1e30 * hidden, hidden), table, targets, weights, **how)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves((value, (dhidden, dtable))), strict=True):
        np.testing.assert_array_equal(a, b)
    alone = value_and_gradients(hidden[~masked], table, targets[~masked], weights[~masked], **how)
    assert_close((value, (dhidden[~masked], dtable)), alone, 2e-6)
    nothing = value_and_gradients(hidden, table, jnp.full_like(targets, -1), weights, **how)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_target_past_the_vocabulary_is_not_a_number(implementation):
    hidden, table, targets, weights = problem(SMALL[1], masked=False)
    targets = targets.at[3].set(table.shape[0])
    losses = losses_and_gradients(hidden, table, targets, weights, chunk=4, implementation=implementation)[0]
    assert np.flatnonzero(np.isnan(losses)).tolist() == [3]
    value, _ = value_and_gradients(hidden, table, targets, weights, chunk=4, z_loss=0.0, implementation=implementation)
    assert np.isnan(value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_of_any_size_are_safe(implementation):
    hidden, table, targets, weights = problem(SMALL[2], masked=False)
    how = {"chunk": 4, "z_loss": 0.0, "implementation": implementation}
    value, (dhidden, _) = value_and_gradients(1e4 * hidden, table, targets, weights, **how)
    logits = (1e4 * np.asarray(hidden, np.float64)) @ np.asarray(table, np.float64).T
    expected = (logits.max(-1) - logits[np.arange(21), np.asarray(targets)]) @ np.asarray(weights)
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # float32's
    best = np.asarray(table)[logits.argmax(-1)] - np.asarray(table)[np.asarray(targets)]
    np.testing.assert_allclose(dhidden, best * np.asarray(weights)[:, None], atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_z_loss_is_in_the_loss_and_not_in_the_cross_entropy(implementation):
    hidden, table, targets, weights = problem(SMALL[1])
    how = {"chunk": 4, "implementation": implementation}
    arrays = (hidden, table, targets, weights)
    loss, cross_entropy = jit(partial(loss_and_cross_entropy, z_loss=Z_LOSS, **how))(*arrays)
    np.testing.assert_allclose(cross_entropy, jit(partial(weighted_loss, **how))(*arrays), rtol=1e-6)
    lse = jax.nn.logsumexp(hidden @ table.T, axis=-1)
    np.testing.assert_allclose(loss - cross_entropy, Z_LOSS * jnp.sum(jnp.where(targets < 0, 0.0, weights) * lse**2), rtol=1e-5)
    sums, of_loss = jit(partial(gradients, z_loss=Z_LOSS, **how))(*arrays)
    np.testing.assert_allclose(sums, (loss, cross_entropy), rtol=1e-6)
    assert_close(of_loss, value_and_gradients(*arrays, z_loss=Z_LOSS, **how)[1], 1e-6)

    def of_cross_entropy(h, w):
        return loss_and_cross_entropy(h, w, targets, weights, z_loss=Z_LOSS, **how)[1]

    assert not any(np.any(g) for g in jit(jax.grad(of_cross_entropy, (0, 1)))(hidden, table))


@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_divided_vocabulary_gives_what_the_whole_one_gives(implementation, z_loss):
    """Tokens over two devices, the vocabulary over two; a device's dhidden is what its rows of the table contribute."""
    arrays = problem(Shape(22, 4, 26, 4))
    how = {"chunk": 4, "implementation": implementation}
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def part(hidden, table, targets, weights):
        loss, (dhidden, dtable) = jax.value_and_grad(weighted_loss, (0, 1))(
            hidden, table, targets, weights, z_loss=z_loss, axis="tensor", **how
        )
        losses, vjp = jax.vjp(lambda h, w: token_losses(h, w, targets, axis="tensor", **how), hidden, table)
        second = vjp(weights)
        over_data, over_tensor = partial(jax.lax.psum, axis_name="data"), partial(jax.lax.psum, axis_name="tensor")
        return over_data(loss), losses, over_tensor(dhidden), over_data(dtable), over_tensor(second[0]), over_data(second[1])

    tokens, rows = P("data"), P("tensor")
    run = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(tokens, rows, tokens, tokens),
        out_specs=(P(), tokens, tokens, rows, tokens, rows),
        check_vma=False,
    )
    loss, losses, dhidden, dtable, *second = jit(run)(*arrays)
    reference = {"chunk": 100, "implementation": "reference"}
    assert_close((loss, (dhidden, dtable)), value_and_gradients(*arrays, z_loss=z_loss, **reference), 5e-6)
    assert_close((losses, second), losses_and_gradients(*arrays, **reference), 5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_checkpoint_and_scan(implementation):
    hidden, table, targets, weights = problem(SMALL[1])
    how = {"chunk": 4, "z_loss": Z_LOSS, "implementation": implementation}

    @partial(jit, static_argnums=2)
    def repeated(hidden, table, wrap):
        def loss_of(hidden, table):
            loss = wrap(lambda h, w: weighted_loss(h, w, targets, weights, **how))
            step = wrap(lambda total, scale: (total + scale * loss(scale * hidden, table), None))
            return jax.lax.scan(step, jnp.zeros(()), jnp.asarray([1.0, 0.5]))[0]

        return jax.value_and_grad(loss_of, (0, 1))(hidden, table)

    ones = value_and_gradients(hidden, table, targets, weights, **how)
    halves = value_and_gradients(0.5 * hidden, table, targets, weights, **how)
    expected = (
        ones[0] + 0.5 * halves[0],
        (ones[1][0] + 0.25 * halves[1][0], ones[1][1] + 0.5 * halves[1][1]),
    )
    for wrap in (_plain, jax.checkpoint):
        assert_close(repeated(hidden, table, wrap), expected, 2e-6)


def _plain(function):
    return function


def test_the_gradient_of_a_wider_table_is_summed_and_given_in_float32():
    hidden, table, targets, weights = problem(Shape(64, 8, 40, 1), jnp.bfloat16)
    wide = table.astype(jnp.float32)
    ours = value_and_gradients(hidden, wide, targets, weights, chunk=1, z_loss=0.0)
    whole = value_and_gradients(hidden, wide, targets, weights, chunk=64, z_loss=0.0)
    assert ours[1][1].dtype == jnp.float32 and ours[1][0].dtype == jnp.bfloat16
    assert_close(ours[1][1], whole[1][1], 1e-6)


def test_weights_get_no_gradient():
    hidden, table, targets, weights = problem(SMALL[1])
    assert not np.any(jit(jax.grad(lambda w: weighted_loss(hidden, table, targets, w, chunk=4)))(weights))


@pytest.mark.parametrize("function", ["weighted_loss", "token_losses"])
def test_memory_is_an_eighth_of_the_logits(function):
    """Temporary memory, forward and backward: measured 0.078 of them, and twice them by the formula."""
    shape = Shape(1024, 16, 16384, 64)
    hidden, table, targets, weights = problem(shape)

    def ours(h, w):
        if function == "weighted_loss":
            return weighted_loss(h, w, targets, weights, chunk=shape.chunk, z_loss=Z_LOSS)
        return jnp.sum(token_losses(h, w, targets, chunk=shape.chunk) * weights)

    def temporary(loss):
        return jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile().memory_analysis().temp_size_in_bytes

    assert temporary(ours) <= 4 * shape.N * shape.V / 8
    assert temporary(lambda h, w: plain_loss(h, w, targets, weights, Z_LOSS)) >= 4 * shape.N * shape.V


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": np.ones((5, 4), np.float32)}, r"hidden \(5, 4\), table \(11, 4\), targets \(16,\) do not fit"),
        ({"table_VD": np.ones((11, 3), np.float32)}, r"hidden \(16, 4\), table \(11, 3\)"),
        ({"hidden_ND": np.ones((16, 2, 2), np.float32)}, r"do not fit \[N,D\], \[V,D\], \[N\]"),
        ({"weights_N": np.ones(15, np.float32)}, r"weights \(15,\) are not \[N\] = \(16,\)"),
        ({"table_VD": np.ones((0, 4), np.float32)}, r"table \(0, 4\) are empty"),
        ({"table_VD": np.ones((11, 4), np.float16)}, "hidden float32, table float16 do not fit"),
        ({"hidden_ND": np.ones((16, 4), np.int32)}, "hidden int32"),
        ({"targets_N": np.ones(16, np.float32)}, "targets are float32, not int32"),
        ({"weights_N": np.ones(16, np.float16)}, "weights are float16, not float32"),
        ({"chunk": 0}, "chunk=0 is not a number of tokens"),
        ({"z_loss": -1.0}, "z_loss=-1.0 must be finite and not negative"),
        ({"axis": "tensor"}, r"axis='tensor' is not one of the axes \(\) of a surrounding jax.shard_map"),
        ({"implementation": "cuda"}, "implementation='cuda' is not known; choose one of reference, xla, triton"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    names = ("hidden_ND", "table_VD", "targets_N", "weights_N")
    arguments = dict(zip(names, problem(SMALL[1]), strict=True)) | {"chunk": 4} | change
    arguments = {name: jnp.asarray(value) if name in names else value for name, value in arguments.items()}
    for function in (weighted_loss, token_losses):
        if function is token_losses:
            arguments.pop("weights_N"), arguments.pop("z_loss", None)
            if "weights_N" in change or "z_loss" in change:
                return
        with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
            jax.eval_shape(lambda function=function: function(**arguments))  # before anything runs


def test_no_token_is_named():
    hidden, table, targets, weights = problem(SMALL[1])
    with pytest.raises(ValueError, match=r"hidden \(0, 4\), table \(11, 4\) are empty; give at least one token"):
        weighted_loss(hidden[:0], table, targets[:0], weights[:0], chunk=4)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "gradient_dtype"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")])
def test_kernels_compile_without_spills(dtype, gradient_dtype, capability):
    """Registers allow 4 programs of 8 warps a multiprocessor for the statistics, 7 for the gradient. Measured: 64, 32."""
    pytest.importorskip("triton")
    from retro_jax.kernels.linear_cross_entropy import triton as kernels

    numbers = {"targets": "*i32", "tops": "*fp32"}
    statistics = {"logits": f"*{dtype}", **numbers, "sums": "*fp32", "target_logits": "*fp32"}
    gradient = {"logits": f"*{dtype}", **numbers, "scales": "*fp32", "weights": "*fp32", "gradients": f"*{gradient_dtype}"}
    V = LARGE[2].V
    for kernel, types, registers in (
        (kernels.cross_entropy_statistics, statistics, 64),
        (kernels.cross_entropy_gradient, gradient, 36),
    ):
        made = report(kernel, types, {"V": V, "BLOCK": kernels.BLOCK}, capability=capability, num_warps=kernels.WARPS)
        assert made.spills == 0 and made.registers <= registers and made.shared <= 4 * kernels.WARPS


def test_a_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(triton_call, "find_spec", lambda name: None)
    hidden, table, targets, weights = problem(SMALL[1])
    with lowering_for_gpu(90), pytest.raises(ValueError, match=r"jax-triton is not installed: pip install -e '\.\[gpu\]'"):
        weighted_loss(hidden, table, targets, weights, chunk=4, implementation="triton")
