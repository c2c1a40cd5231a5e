"""The axes of the mesh by name, and where a device stands on them.

The model is written for the part of a batch and of the parameters that one device holds, and runs under ``jax.shard_map``. Each
function here asks JAX which axes it runs under: outside a mesh, or where an axis has one device, all of them are the identity, so
that the same model runs undivided.
"""

from __future__ import annotations

import jax
from jax import lax

DATA, FSDP, SEQUENCE, TENSOR = "data", "fsdp", "sequence", "tensor"
AXES = (DATA, FSDP, SEQUENCE, TENSOR)
BATCH = (DATA, FSDP)
"""The axes that a batch's rows are divided over."""
OVER_TENSOR = ("vocab", "heads", "kv_heads", "ffn")
"""Logical dims of which the devices along ``tensor`` hold and compute a part each; along others a part is gathered before use."""


def axis_size(axis: str) -> int:
    """How many devices share the work along ``axis``: 1 outside ``jax.shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def axis_index(axis: str) -> jax.Array | int:
    """This device's place along ``axis``, from 0."""
    return lax.axis_index(axis) if axis_size(axis) > 1 else 0


def batch_index() -> jax.Array | int:
    """Which part of a batch's rows this device has."""
    return axis_index(DATA) * axis_size(FSDP) + axis_index(FSDP)
