"""How the same numbers lie in two checkpoints: pairs of inverse functions on lists of arrays.

Ours keep the dims apart (width, heads, head dim; two for key and value, for gate and up); others merge them into matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Arrays = list[np.ndarray]
Shapes = Sequence[tuple[int, ...]]


class Layout(NamedTuple):
    """``pack`` makes their arrays from ours, ``unpack`` ours, of the given shapes, from theirs; they only move numbers."""

    pack: Callable[[Arrays], Arrays]
    unpack: Callable[[Arrays, Shapes], Arrays]


def _reshaped(arrays: Arrays, shapes: Shapes) -> Arrays:
    return [array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]


# The same numbers in the same order: as they are, or in one dim.
SAME = Layout(lambda ours: ours, _reshaped)
FLAT = Layout(lambda ours: [array.reshape(-1) for array in ours], _reshaped)


def matrix(in_dims: int, *, out_first: bool = True) -> Layout:
    """A weight of ``in_dims`` input dims as a matrix [out, in] (PyTorch's Linear) or [in, out]."""

    def pack(ours: Arrays) -> Arrays:
        flat_DO = ours[0].reshape(math.prod(ours[0].shape[:in_dims]), -1)
        return [flat_DO.T if out_first else flat_DO]

    def unpack(theirs: Arrays, shapes: Shapes) -> Arrays:
        return [(theirs[0].T if out_first else theirs[0]).reshape(shapes[0])]

    return Layout(pack, unpack)


def merged(layout: Layout, ndim: int, *, out_first: bool = True) -> Layout:
    """A layout between weights with one input dim and matrices [in, out], made one for matrices [out, in] unless ``out_first``
    is False, and for biases, which have no input dim.

    Args:
        ndim: dims of our first weight; an array of fewer is a bias.
    """

    def pack(ours: Arrays) -> Arrays:
        if ours[0].ndim < ndim:
            return [matrix_1O[0] for matrix_1O in layout.pack([array[None] for array in ours])]
        return [matrix_DO.T if out_first else matrix_DO for matrix_DO in layout.pack(ours)]

    def unpack(theirs: Arrays, shapes: Shapes) -> Arrays:
        if len(shapes[0]) < ndim:
            return _reshaped(layout.unpack([array[None] for array in theirs], [(1, *shape) for shape in shapes]), shapes)
        return layout.unpack([array.T if out_first else array for array in theirs], shapes)

    return Layout(pack, unpack)


def _pack_groups(ours: Arrays) -> Arrays:
    query_DNH, kv_D2GH = ours
    D, _, G, H = kv_D2GH.shape
    packed = np.concatenate([query_DNH.reshape(D, G, -1, H), kv_D2GH.transpose(0, 2, 1, 3)], axis=2)
    return [packed.reshape(D, -1)]


def _unpack_groups(theirs: Arrays, shapes: Shapes) -> Arrays:
    (D, N, H), (_, _, G, _) = shapes
    packed = theirs[0].reshape(D, G, N // G + 2, H)
    return [packed[:, :, : N // G].reshape(D, N, H), packed[:, :, N // G :].transpose(0, 2, 1, 3)]


def _pack_heads(ours: Arrays) -> Arrays:
    return [ours[0].transpose(0, 2, 1, 3).reshape(len(ours[0]), -1)]


def _unpack_heads(theirs: Arrays, shapes: Shapes) -> Arrays:
    D, _, G, H = shapes[0]
    return [theirs[0].reshape(D, G, 2, H).transpose(0, 2, 1, 3)]


def _pack_pair(ours: Arrays) -> Arrays:
    return [ours[0][:, part].reshape(len(ours[0]), -1) for part in range(2)]


def _unpack_pair(theirs: Arrays, shapes: Shapes) -> Arrays:
    D, _, *rest = shapes[0]
    return [np.stack([part.reshape(D, *rest) for part in theirs], axis=1)]


def _pack_side_by_side(ours: Arrays) -> Arrays:
    return [np.concatenate([array.reshape(len(array), -1) for array in ours], axis=1)]


def _unpack_side_by_side(theirs: Arrays, shapes: Shapes) -> Arrays:
    ends = np.cumsum([math.prod(shape[1:]) for shape in shapes])[:-1]
    return _reshaped(np.split(theirs[0], ends, axis=1), shapes)


# Query and key/value in one: for each group its queries, its key, its value (Megatron's linear_qkv).
BY_GROUP = merged(Layout(_pack_groups, _unpack_groups), 3)
# Key/value in one: for each head its key, its value (Megatron's linear_kv).
BY_HEAD = merged(Layout(_pack_heads, _unpack_heads), 4)
# Query and key/value in one: all queries, all keys, all values (GPT-2's c_attn).
SIDE_BY_SIDE = merged(Layout(_pack_side_by_side, _unpack_side_by_side), 3, out_first=False)
# Key/value, and gate/up, as two.
KEY_AND_VALUE = merged(Layout(_pack_pair, _unpack_pair), 4)
GATE_AND_UP = merged(Layout(_pack_pair, _unpack_pair), 3)


def _pack_gated(ours: Arrays) -> Arrays:
    weight, gate = ours
    return matrix(2).pack([weight * gate.astype(weight.dtype)])


def _pack_gated_bias(ours: Arrays) -> Arrays:
    bias, gate = ours
    return [bias * gate.astype(bias.dtype)]


def _no_gate(theirs: Arrays, shapes: Shapes) -> Arrays:
    raise AssertionError("a gate folded into a weight is not taken out again")


# An output projection, and its bias, times the gate on them.
GATED_OUT = Layout(_pack_gated, _no_gate)
GATED_BIAS = Layout(_pack_gated_bias, _no_gate)
