"""The GPT layer of Korthikanti et al. (2022), with dropout everywhere and an explicit softmax, as one device of t computes it.

It is built from the operations of the model's own layers. What it keeps for its backward pass, and what it computes, is read off
the traced program: nothing is computed or allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Var
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.kernels.dropout import kept
from retro_jax.kernels.saved import where_kept
from retro_jax.model.layers import Noise, activate, dropout, normalise, numbered
from retro_jax.parallel.axes import TENSOR, axis_size
from retro_jax.parallel.collectives import gather_tokens, gathered_again, sum_into_own_tokens
from retro_jax.planning.paper import PaperModel, PaperPolicy
from retro_jax.planning.program import product_flops

RATE = 0.1


class LayerParameters(NamedTuple):
    """Weights and biases; D width, N heads, H head width, F = 4 D."""

    first_scale_D: jax.Array
    first_bias_D: jax.Array
    second_scale_D: jax.Array
    second_bias_D: jax.Array
    qkv_D3NH: jax.Array
    qkv_bias_3NH: jax.Array
    out_NHD: jax.Array
    out_bias_D: jax.Array
    up_DF: jax.Array
    up_bias_F: jax.Array
    down_FD: jax.Array
    down_bias_D: jax.Array


WHOLE = ("first_scale_D", "first_bias_D", "second_scale_D", "second_bias_D", "out_bias_D", "down_bias_D")
"""Parameters that every device has; with sequence parallelism each finds the gradient of its own tokens alone."""
SPECS = LayerParameters(
    P(), P(), P(), P(), P(None, None, TENSOR), P(None, TENSOR), P(TENSOR), P(), P(None, TENSOR), P(TENSOR), P(TENSOR), P()
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How the layer is divided and what it computes again: a row of the paper's Table 2."""

    sequence: bool
    policy: PaperPolicy

    @property
    def stream(self) -> P:
        """How the residual stream [B, T, D] is divided."""
        return P(None, TENSOR) if self.sequence else P()


FORMS = {
    "tensor": Form(False, "none"),
    "tensor + sequence": Form(True, "none"),
    "tensor + selective": Form(False, "selective"),
    "tensor + sequence + selective": Form(True, "selective"),
    "full": Form(False, "full"),
}


def layer(x_BTD: jax.Array, p: LayerParameters, key: jax.Array, numbers_BT: jax.Array, form: Form) -> jax.Array:
    """The stream after one layer, on one device under ``jax.shard_map``, or on one device alone.

    Args:
        x_BTD: all tokens, or with sequence parallelism this device's share.
        p: this device's part.
        key: what is dropped depends on it, and on the numbers of tokens and heads alone.
        numbers_BT: uint32, the tokens' numbers, of all of them.
        form: of :data:`FORMS`.
    """
    run = partial(_layer, form=form)
    return (jax.checkpoint(run) if form.policy == "full" else run)(x_BTD, p, key, numbers_BT)


def _layer(x_BTD: jax.Array, p: LayerParameters, key: jax.Array, numbers_BT: jax.Array, *, form: Form) -> jax.Array:
    attention_noise, mlp_noise = (_noise(jax.random.fold_in(key, part), numbers_BT, form) for part in (1, 2))
    y_BTD = normalise(x_BTD, p.first_scale_D, p.first_bias_D, kind="layernorm", eps=1e-5)
    qkv = _columns("btd,dcnh->btcnh", y_BTD, p.qkv_D3NH, form) + p.qkv_bias_3NH[None, None]
    core = jax.checkpoint(core_attention) if form.policy == "selective" else core_attention
    o_BTNH = core(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], key, numbers_BT)
    read_BTD = _rows("btnh,nhd->btd", o_BTNH, p.out_NHD, form) + p.out_bias_D[None, None]
    x_BTD = x_BTD + dropout(read_BTD, RATE, attention_noise)
    y_BTD = normalise(x_BTD, p.second_scale_D, p.second_bias_D, kind="layernorm", eps=1e-5)
    up_BTF = _columns("btd,df->btf", y_BTD, p.up_DF, form) + p.up_bias_F[None, None]
    down_BTD = _rows("btf,fd->btd", activate(up_BTF, "gelu"), p.down_FD, form) + p.down_bias_D[None, None]
    return x_BTD + dropout(down_BTD, RATE, mlp_noise)


def core_attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, key: jax.Array, numbers_BT: jax.Array) -> jax.Array:
    """What selective recomputation computes again: scores, softmax, its dropout, and values."""
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH)
    weights_BNTS = causal_softmax(scores_BNTS, q_BTNH.shape[-1] ** -0.5)
    numbers_BTN = numbered(key, numbers_BT).queries(q_BTNH.shape[2], q_BTNH.shape[2] * axis_size(TENSOR))
    keep_BNTS = kept(jax.random.fold_in(key, 0), RATE, numbers_BTN.swapaxes(1, 2), k_BTNH.shape[1])
    return jnp.einsum("bnts,bsnh->btnh", where_kept(weights_BNTS, keep_BNTS, RATE), v_BTNH)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def causal_softmax(scores_BNTS: jax.Array, scale: float) -> jax.Array:
    """Softmax of the scaled scores up to each token's own place, in float32; kept is the result, in the dtype of the scores."""
    scores = scores_BNTS.astype(jnp.float32) * scale
    query, key = (lax.broadcasted_iota(jnp.int32, scores.shape, dim) for dim in (2, 3))
    return jax.nn.softmax(jnp.where(key <= query, scores, -jnp.inf), axis=-1).astype(scores_BNTS.dtype)


def _causal_softmax_fwd(scores_BNTS: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    weights_BNTS = causal_softmax(scores_BNTS, scale)
    return weights_BNTS, weights_BNTS


def _causal_softmax_bwd(scale: float, weights_BNTS: jax.Array, d_weights_BNTS: jax.Array) -> tuple[jax.Array]:
    weights, d_weights = weights_BNTS.astype(jnp.float32), d_weights_BNTS.astype(jnp.float32)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    return (d_scores.astype(weights_BNTS.dtype),)


causal_softmax.defvjp(_causal_softmax_fwd, _causal_softmax_bwd)


@jax.custom_vjp
def copied_in(x: jax.Array) -> jax.Array:
    """Megatron's f: the identity, whose gradient is summed over ``tensor`` (an all-reduce of the whole stream backward)."""
    return x


copied_in.defvjp(lambda x: (x, None), lambda _, d_x: (lax.psum(d_x, TENSOR),))


@jax.custom_vjp
def summed_out(y: jax.Array) -> jax.Array:
    """Megatron's g: the sum over ``tensor`` (an all-reduce of the whole stream forward), whose gradient is the identity."""
    return lax.psum(y, TENSOR)


summed_out.defvjp(lambda y: (lax.psum(y, TENSOR), None), lambda _, d_y: (d_y,))


def _columns(dims: str, x_BTD: jax.Array, weight: jax.Array, form: Form) -> jax.Array:
    """All tokens' product with this device's columns. With sequence parallelism its share of x is kept, and gathered again."""
    if form.sequence:
        return gathered_again(lambda x, weight: jnp.einsum(dims, gather_tokens(x), weight))(x_BTD, weight)
    return jnp.einsum(dims, x_BTD if axis_size(TENSOR) == 1 else copied_in(x_BTD), weight)


def _rows(dims: str, y: jax.Array, weight: jax.Array, form: Form) -> jax.Array:
    """The sum over devices of products with their rows: of all tokens, or of this device's share."""
    product_BTD = jnp.einsum(dims, y, weight)
    if form.sequence:
        return sum_into_own_tokens(product_BTD)
    return product_BTD if axis_size(TENSOR) == 1 else summed_out(product_BTD)


def _noise(key: jax.Array, numbers_BT: jax.Array, form: Form) -> Noise:
    return numbered(key, numbers_BT) if form.sequence else Noise(key, numbers_BT, numbers_BT)


def gradients(
    x_BTD: jax.Array, d_BTD: jax.Array, p: LayerParameters, key: jax.Array, numbers_BT: jax.Array, form: Form
) -> tuple[jax.Array, jax.Array, LayerParameters]:
    """The stream after the layer, and the gradients of the stream before it and of the parameters, for the gradient ``d_BTD``."""
    after_BTD, pull = jax.vjp(lambda x, p: layer(x, p, key, numbers_BT, form), x_BTD, p)
    d_x_BTD, d_p = pull(d_BTD)
    if form.sequence and axis_size(TENSOR) > 1:
        d_p = d_p._replace(**{name: lax.psum(getattr(d_p, name), TENSOR) for name in WHOLE})
    return after_BTD, d_x_BTD, d_p


def divided(function: Any, form: Form, mesh: Mesh | AbstractMesh) -> Any:
    """:func:`gradients` of whole arrays, on all devices of a mesh with the axis ``tensor``."""
    specs = (form.stream, form.stream, SPECS, P(), P())
    out = (form.stream, form.stream, SPECS)
    return jax.shard_map(partial(function, form=form), mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


def shapes(model: PaperModel) -> LayerParameters:
    """The parameters' shapes in bfloat16."""
    D, N, H, F = model.width, model.heads, model.width // model.heads, 4 * model.width
    sizes = ((D,), (D,), (D,), (D,), (D, 3, N, H), (3, N, H), (N, H, D), (D,), (D, F), (F,), (F, D), (D,))
    return LayerParameters(*(jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes))


def _abstract(model: PaperModel) -> tuple[AbstractMesh, tuple[Any, ...]]:
    mesh = AbstractMesh((model.tensor,), (TENSOR,), axis_types=(AxisType.Auto,))
    stream = jax.ShapeDtypeStruct((model.microbatch, model.seq_len, model.width), jnp.bfloat16)
    numbers = jax.ShapeDtypeStruct((model.microbatch, model.seq_len), jnp.uint32)
    return mesh, (stream, shapes(model), jax.eval_shape(lambda: jax.random.key(0)), numbers)


def program_bytes(model: PaperModel, form: Form) -> int:
    """What one device keeps of a layer for its backward pass, the stream that it was given counted, its parameters not."""
    mesh, arguments = _abstract(model)

    def residuals(x_BTD: jax.Array, p: LayerParameters, key: jax.Array, numbers_BT: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(jax.vjp(lambda x, p: layer(x, p, key, numbers_BT, form), x_BTD, p)[1])

    run = jax.shard_map(residuals, mesh=mesh, in_specs=(form.stream, SPECS, P(), P()), out_specs=P(), check_vma=False)
    program = jax.make_jaxpr(run)(*arguments)
    (mapped,) = (equation for equation in program.jaxpr.eqns if equation.primitive.name == "shard_map")
    inside = mapped.params["jaxpr"]
    arrays = {v for v in inside.outvars if isinstance(v, Var)} - {*inside.invars[1:], *inside.constvars}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in arrays)


def compiled_bytes(model: PaperModel, form: Form, mesh: Mesh, few: int = 4, many: int = 8) -> float:
    """What XLA's program holds for each layer between forward and backward pass: the growth of its temporary bytes with depth.

    Args:
        mesh: of described devices (:func:`retro_jax.planning.compiled.described_mesh`).
        few, many: the numbers of layers that are compiled.
    """

    def temporary(layers: int) -> int:
        stack = partial(_stack_gradients, form=form)
        specs = LayerParameters(*(P(None, *spec) for spec in SPECS))
        run = jax.shard_map(
            stack,
            mesh=mesh,
            in_specs=(form.stream, form.stream, specs, P(), P()),
            out_specs=(form.stream, specs),
            check_vma=False,
        )

        def placed(array: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

        _, (stream, params, key, numbers) = _abstract(model)
        stream = placed(stream, form.stream)
        params = LayerParameters(
            *(placed(jax.ShapeDtypeStruct((layers, *p.shape), p.dtype), s) for p, s in zip(params, specs, strict=True))
        )
        memory = jax.jit(run).lower(stream, stream, params, placed(key, P()), placed(numbers, P())).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    return (temporary(many) - temporary(few)) / (many - few)


def _stack_gradients(
    x_BTD: jax.Array, d_BTD: jax.Array, stacked: LayerParameters, key: jax.Array, numbers_BT: jax.Array, *, form: Form
) -> tuple[jax.Array, LayerParameters]:
    def run(x_BTD: jax.Array, stacked: LayerParameters) -> jax.Array:
        def body(x_BTD: jax.Array, own: tuple[LayerParameters, jax.Array]) -> tuple[jax.Array, None]:
            return layer(x_BTD, own[0], jax.random.fold_in(key, own[1]), numbers_BT, form), None

        return lax.scan(body, x_BTD, (stacked, jnp.arange(stacked.up_DF.shape[0])))[0]

    return jax.vjp(run, x_BTD, stacked)[1](d_BTD)


def program_flops(model: PaperModel, form: Form) -> int:
    """Operations of a layer's matrix products, forward and backward, on all devices together, of one microbatch."""
    mesh, (stream, *others) = _abstract(model)
    return model.tensor * product_flops(jax.make_jaxpr(divided(gradients, form, mesh))(stream, stream, *others))
