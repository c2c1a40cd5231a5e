"""Parameters and the small pure functions around them: norms, linear maps, embeddings, rotary positions, activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import Activation, Norm
from retro_jax.kernels.precision import accumulation_dtype

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def normal(std: float) -> Initializer:
    """Initialiser: independent normal numbers of standard deviation ``std``."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def constant(value: float) -> Initializer:
    """Initialiser: one value everywhere."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def parameter(key: jax.Array, dims: str, shape: tuple[int, ...], init: Initializer) -> nnx.Param:
    """A float32 parameter with its logical dims ("width ffn"), shape and initialiser in one place."""
    return nnx.Param(init(key, shape), dims=tuple(dims.split()))


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
    """The norm of ``kind`` over the last dim; statistics in float32 (float64 for float64), result in x's dtype."""
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
    """

    def __init__(
        self, dims: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...], *, bias: bool, init: Initializer, key: jax.Array
    ) -> None:
        self.in_dims = len(in_shape)
        self.weight = parameter(key, dims, (*in_shape, *out_shape), init)
        out_names = " ".join(dims.split()[len(in_shape) :])
        self.bias = parameter(key, out_names, out_shape, constant(0.0)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, self.weight[...], axes=self.in_dims)
        if self.bias is None:
            return y
        bias = self.bias[...]
        return y + bias[(None,) * (y.ndim - bias.ndim)]


class Embedding(nnx.Module):
    """A table of rows; looking up a row outside it is a bug of the caller (ids are checked when the data are built)."""

    def __init__(self, dims: str, rows: int, width: int, *, init: Initializer, key: jax.Array) -> None:
        self.table = parameter(key, dims, (rows, width), init)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.table[...].at[ids].get(mode="promise_in_bounds")


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
    """The feed-forward activation; for "swiglu" x carries [gate, up] in its last but one dim."""
    if kind == "swiglu":
        return jax.nn.silu(x[..., 0, :]) * x[..., 1, :]
    if kind == "relu":
        return jax.nn.relu(x)
    if kind == "squared_relu":
        return jnp.square(jax.nn.relu(x))
    return jax.nn.gelu(x, approximate=kind == "gelu_tanh")


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share of x and scale the rest; the identity without a key."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """``count`` keys, or as many Nones when there is no dropout to seed."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def residual_std(std: float, num_layers: int) -> float:
    """Standard deviation of projections that write into the residual stream (GPT-2, Megatron): std / sqrt(2 L)."""
    return std / math.sqrt(2 * num_layers)
