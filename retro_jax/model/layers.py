"""Parameters and the small pure functions around them: norms, linear maps, embeddings, rotary positions, activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retro_jax.config import Activation, Norm, Part
from retro_jax.kernels.dropout import kept
from retro_jax.kernels.precision import accumulation_dtype
from retro_jax.kernels.saved import from_arguments, where_kept
from retro_jax.parallel.axes import FSDP, OVER_TENSOR, TENSOR, axis_index
from retro_jax.parallel.collectives import gather_parameter, gather_tokens, gathered_again, own_tokens, sum_into_own_tokens

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def normal(std: float) -> Initializer:
    """Initialiser: independent normal numbers of standard deviation ``std``."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def constant(value: float) -> Initializer:
    """Initialiser: one value everywhere."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def parameter(key: jax.Array, dims: str, shape: tuple[int, ...], init: Initializer) -> nnx.Param:
    """A float32 parameter with its logical dims ("width ffn"), whole shape and initialiser in one place."""
    return nnx.Param(init(key, shape), dims=tuple(dims.split()), whole=shape)


def gathered(param: nnx.Param, *, alone: bool = False) -> jax.Array:
    """The array to compute with: what this device has, made whole along the dims that are not computed in parts; ``alone``: along
    all dims, over ``fsdp`` before ``tensor``, whose devices are nearer."""
    array = param[...]
    for axis in (FSDP, TENSOR) if alone else (FSDP,):
        for dim, (name, size) in enumerate(zip(param.dims, param.whole, strict=True)):
            if (name in OVER_TENSOR) == (axis == TENSOR) and array.shape[dim] != size:
                array = gather_parameter(array, dim, axis)
    return array


class NormLayer(nnx.Module):
    """LayerNorm, LayerNorm1p (weight stored as its difference from 1) or RMSNorm over the last dim."""

    def __init__(self, kind: Norm, width: int, eps: float, *, key: jax.Array) -> None:
        self.kind, self.eps = kind, eps
        self.scale = parameter(key, "width", (width,), constant(0.0 if kind == "layernorm1p" else 1.0))
        self.bias = parameter(key, "width", (width,), constant(0.0)) if kind != "rmsnorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        return normalise(x, self.scale[...], bias, kind=self.kind, eps=self.eps)


def normalise(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, *, kind: Norm, eps: float) -> jax.Array:
    """The norm of ``kind`` over the last dim; statistics in float32 (float64 for float64), result in x's dtype.

    The backward pass keeps the arguments, and computes the statistics again.
    """
    return from_arguments(partial(_normalised, kind=kind, eps=eps))(x, scale_D, bias_D)


def _normalised(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, *, kind: Norm, eps: float) -> jax.Array:
    wide = accumulation_dtype(x.dtype)
    y = x.astype(wide)
    if kind != "rmsnorm":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
    lead = (None,) * (x.ndim - 1)
    gain = scale_D.astype(wide)[lead]
    y = y * (1.0 + gain if kind == "layernorm1p" else gain)
    if bias_D is not None:
        y = y + bias_D.astype(wide)[lead]
    return y.astype(x.dtype)


class Linear(nnx.Module):
    """y = x W + b from the last dim to one or several dims.

    Args:
        dims: logical dims of the weight, input first ("width heads head_dim").
        in_shape, out_shape: sizes of the input and output dims.

    ``alone``: computed whole on each device along ``tensor``.
    """

    def __init__(
        self, dims: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...], *, bias: bool, init: Initializer, key: jax.Array
    ) -> None:
        self.in_dims, self.alone = len(in_shape), False
        self.weight = parameter(key, dims, (*in_shape, *out_shape), init)
        out_names = " ".join(dims.split()[len(in_shape) :])
        self.bias = parameter(key, out_names, out_shape, constant(0.0)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.add_bias(self.product(x))

    def product(self, x: jax.Array) -> jax.Array:
        """x W, with the part of W that this device computes with."""
        return product(x, gathered(self.weight, alone=self.alone), self.in_dims)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """y + b."""
        if self.bias is None:
            return y
        bias = gathered(self.bias, alone=self.alone)
        return y + bias[(None,) * (y.ndim - bias.ndim)]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, weight: jax.Array, in_dims: int = 1) -> jax.Array:
    """x W over the last ``in_dims`` dims of x and the first of W; W's gradient is multiplied as the platform does it fast."""
    return jnp.tensordot(x, weight, in_dims)


def _product_fwd(x: jax.Array, weight: jax.Array, in_dims: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, weight, in_dims), (x, weight)


def _product_bwd(in_dims: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    ins, outs = math.prod(weight.shape[:in_dims]), math.prod(weight.shape[in_dims:])

    def default(x_MI: jax.Array, dy_MO: jax.Array) -> jax.Array:
        return jnp.matmul(dy_MO.T, x_MI).T

    def on_cpu(x_MI: jax.Array, dy_MO: jax.Array) -> jax.Array:
        # The barriers keep XLA from computing dy a second time in the other order, and from turning the larger of the two
        # (8192 tokens, 256 to 1024 columns: 32 ms; 1024 to 256: 37 against 54 ms).
        dy_MO = jax.lax.optimization_barrier(dy_MO)
        if ins <= outs:
            return jnp.matmul(x_MI.T, dy_MO)
        return jax.lax.optimization_barrier(jnp.matmul(jax.lax.optimization_barrier(dy_MO.T), x_MI)).T

    dy_MO = dy.reshape(-1, outs)
    dweight = jax.lax.platform_dependent(x.reshape(-1, ins), dy_MO, cpu=on_cpu, default=default)
    dx = jnp.matmul(dy_MO, weight.reshape(ins, outs).T)
    return dx.reshape(x.shape), dweight.reshape(weight.shape)


product.defvjp(_product_fwd, _product_bwd)


@jax.custom_vjp
def two_products(x: jax.Array, y: jax.Array, weight_D2O: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x W[:, 0] and y W[:, 1]. The backward pass keeps W, not its halves."""
    return product(x, weight_D2O[:, 0]), product(y, weight_D2O[:, 1])


def _two_products_fwd(x: jax.Array, y: jax.Array, weight_D2O: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
    return two_products(x, y, weight_D2O), (x, y, weight_D2O)


def _two_products_bwd(kept: tuple[jax.Array, ...], gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    x, y, weight_D2O = kept
    dx, dfirst = _product_bwd(1, (x, weight_D2O[:, 0]), gradients[0])
    dy, dsecond = _product_bwd(1, (y, weight_D2O[:, 1]), gradients[1])
    return dx, dy, jnp.stack([dfirst, dsecond], axis=1)


two_products.defvjp(_two_products_fwd, _two_products_bwd)


def project_in(x_XTD: jax.Array, *linears: Callable[[jax.Array], Any], part: Part) -> tuple[Any, ...]:
    """Projections into heads or columns (column-parallel): of all tokens, into this device's part of the heads or columns.

    Args:
        x_XTD: this device's share of the tokens. All of them are gathered, and again in the backward pass; computed alone, these
            are all.
        part: the sub-layer; where it does not gather again, all tokens are saved.
    """
    x_XTD = checkpoint_name(x_XTD, f"{part.name}_in")

    def compute(x_XTD: jax.Array) -> tuple[Any, ...]:
        if not part.alone:
            x_XTD = checkpoint_name(gather_tokens(x_XTD), f"{part.name}_gathered")
        return tuple(linear(x_XTD) for linear in linears)

    return gathered_again(compute, part.gathers_again)(x_XTD)


def project_out(y: jax.Array, linear: Linear, part: Part) -> jax.Array:
    """The projection back into the residual stream (row-parallel): this device's share of the tokens, summed over all parts of
    the heads or columns; the bias is added once."""

    def compute(y: jax.Array) -> jax.Array:
        return linear.product(y) if part.alone else sum_into_own_tokens(linear.product(y))

    return linear.add_bias(gathered_again(compute, part.gathers_again)(y))


class Embedding(nnx.Module):
    """A table of rows; looking up a row outside it is a bug of the caller (ids are checked when the data are built)."""

    def __init__(self, dims: str, rows: int, width: int, *, init: Initializer, key: jax.Array) -> None:
        self.table = parameter(key, dims, (rows, width), init)

    def __call__(self, ids_XT: jax.Array, *, share: int | None = -1) -> jax.Array:
        """Rows [..., T, D] of this device's share of the T tokens.

        Args:
            ids_XT: the same on all devices along ``tensor``.
            share: the dim that they share; None: each has all rows, of a table that is not divided over them.
        """
        dim = None if share is None else share % ids_XT.ndim
        if self.table.dims[0] in OVER_TENSOR and self.table.shape[0] != self.table.whole[0]:
            assert dim is not None
            return gathered_again(lambda ids: sum_into_own_tokens(self._rows_here(ids), dim))(ids_XT)
        own_XT = ids_XT if dim is None else own_tokens(ids_XT, dim)
        return gathered_again(lambda ids: gathered(self.table).at[ids].get(mode="promise_in_bounds"))(own_XT)

    def _rows_here(self, ids_XT: jax.Array) -> jax.Array:
        """The rows that lie in this device's part of the table, zeros for the others."""
        table_VD = gathered(self.table)
        row_XT = ids_XT - axis_index(TENSOR) * table_VD.shape[0]
        here_XT = (row_XT >= 0) & (row_XT < table_VD.shape[0])
        rows = table_VD.at[jnp.where(here_XT, row_XT, 0)].get(mode="promise_in_bounds")
        return jnp.where(here_XT[..., None], rows, jnp.zeros_like(rows))


def rotate(x_XTNH: jax.Array, positions_XT: jax.Array, *, fraction: float, base: float, scale: float) -> jax.Array:
    """Rotary positions on the first ``fraction`` of each head's dims, in halves (RoFormer; Megatron's and Llama's layout).

    Args:
        positions_XT: int positions; divided by ``scale`` (linear interpolation).

    The tables are float32 for every dtype of x.
    """
    rotated = int(x_XTNH.shape[-1] * fraction) // 2 * 2
    inverse = base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    angles_XT1F = (positions_XT.astype(jnp.float32) / scale)[:, :, None, None] * inverse[None, None, None, :]
    cos, sin = jnp.cos(angles_XT1F).astype(x_XTNH.dtype), jnp.sin(angles_XT1F).astype(x_XTNH.dtype)
    a, b, rest = jnp.split(x_XTNH, (rotated // 2, rotated), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def activate(x: jax.Array, kind: Activation) -> jax.Array:
    """The feed-forward activation, of which the backward pass keeps x; for "swiglu" x carries [gate, up] in its last but one
    dim."""
    return from_arguments(partial(_activated, kind=kind))(x)


def _activated(x: jax.Array, *, kind: Activation) -> jax.Array:
    if kind == "swiglu":
        return jax.nn.silu(x[..., 0, :]) * x[..., 1, :]
    if kind == "relu":
        return jax.nn.relu(x)
    if kind == "squared_relu":
        return jnp.square(jax.nn.relu(x))
    return jax.nn.gelu(x, approximate=kind == "gelu_tanh")


class Noise(NamedTuple):
    """What dropout is drawn from: a key, and the tokens' numbers in the whole batch, so that the same is dropped however the
    batch is divided over devices. uint32; ``own_XT`` of this device's share of the tokens, ``all_XT`` of all of them."""

    key: jax.Array
    own_XT: jax.Array
    all_XT: jax.Array

    def part(self, number: jax.Array | int) -> Noise:
        """The noise of part ``number`` of what this noise is for."""
        return self._replace(key=jax.random.fold_in(self.key, number))

    def queries(self, heads: int, of: int) -> jax.Array:
        """A number for each query [X, T, heads] of this device's heads, which are some ``of`` so many or all of them."""
        first = axis_index(TENSOR) * heads if heads < of else 0
        head_N = (first + jnp.arange(heads)).astype(jnp.uint32)
        return self.all_XT[:, :, None] * jnp.uint32(of) + head_N[None, None]


def numbered(key: jax.Array, numbers_XT: jax.Array) -> Noise:
    """The noise of tokens with these numbers."""
    return Noise(key, own_tokens(numbers_XT), numbers_XT)


def dropout(x_XTD: jax.Array, rate: float, noise: Noise | None) -> jax.Array:
    """Zero a share of x and scale the rest, of which the backward pass keeps what was dropped; the identity without noise."""
    if rate == 0.0 or noise is None:
        return x_XTD
    keep = kept(noise.key, rate, noise.own_XT, x_XTD.shape[-1])
    return where_kept(x_XTD, keep, rate)


def parts(noise: Noise | None, count: int) -> list[Noise | None]:
    """Noise for each of ``count`` parts, or as many Nones when there is no dropout."""
    return [None if noise is None else noise.part(number) for number in range(count)]


def residual_std(std: float, num_layers: int) -> float:
    """Standard deviation of projections that write into the residual stream (GPT-2, Megatron): std / sqrt(2 L)."""
    return std / math.sqrt(2 * num_layers)
