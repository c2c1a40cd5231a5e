"""What every device holds of parameters and batches, and how a function of its parts is run on all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.config import MeshConfig
from retro_jax.data.batch import Batch
from retro_jax.errors import UserError
from retro_jax.parallel.axes import AXES, BATCH, FSDP, OVER_TENSOR, SEQUENCE, TENSOR
from retro_jax.parallel.collectives import gather_parameter, sum_into_shard


def make_mesh(config: MeshConfig) -> Mesh:
    """The devices in the order of the axes, ``tensor`` innermost, where links are fastest.

    Raises:
        UserError: there are not so many; or there are several processes, of which some would have none of those that are used.
    """
    there, processes = jax.device_count(), jax.process_count()
    if processes > 1 and config.devices != there:
        sizes = " * ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise UserError(
            f"{processes} processes have {there} devices together, but MeshConfig's {sizes} are {config.devices}; choose sizes "
            f"whose product is {there}, or start another number of processes"
        )
    if config.devices > there:
        sizes = ", ".join(f"MeshConfig.{axis}={getattr(config, axis)}" for axis in AXES if getattr(config, axis) > 1)
        raise UserError(f"{sizes} take {config.devices} devices, and there are {there}; lower one of them")
    shape = tuple(getattr(config, axis) for axis in AXES)
    devices = jax.devices()[: config.devices] if config.devices < there else None
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def make_layout(config: MeshConfig) -> Layout | None:
    """The layout of a run; None where one device does all of it.

    Raises:
        UserError: as of :func:`make_mesh`.
    """
    mesh = make_mesh(config)
    return Layout(config, mesh) if config.devices > 1 else None


@dataclass(frozen=True)
class Layout:
    """A mesh, of devices or of their numbers alone, and the rules by which arrays are divided over it."""

    config: MeshConfig
    mesh: Mesh | AbstractMesh

    def parameter(self, dims: tuple[str, ...], shape: tuple[int, ...]) -> P:
        """How a parameter is divided.

        Args:
            dims: the logical dims of one layer.
            shape: with the leading dim of a scanned stack, if there is one.

        Raises:
            UserError: a dim is not divisible, or two dims fall on one axis.
        """
        lead = len(shape) - len(dims)
        axes: list[str | None] = [None] * lead
        for name, size in zip(dims, shape[lead:], strict=True):
            axes.append(self._axis(name, size, dims))
        used = [axis for axis in axes if axis is not None]
        if len(used) != len(set(used)):
            raise UserError(
                f"MeshConfig.fsdp_dims={self.config.fsdp_dims} divides two dims of a parameter [{' '.join(dims)}]; leave one out"
            )
        return P(*axes)

    def _axis(self, name: str, size: int, dims: tuple[str, ...]) -> str | None:
        if name in OVER_TENSOR:
            axis, parts = TENSOR, self.config.tensor
            if name == "kv_heads" and parts % size == 0:
                return axis if parts == size > 1 else None  # fewer than devices: each has all of them
        elif name in self.config.fsdp_dims and len(dims) > 1:
            axis, parts = FSDP, self.config.fsdp
        else:
            return None
        if size % parts:
            raise UserError(f"{name}={size} is not divisible by MeshConfig.{axis}={parts}; change one of them")
        return axis if parts > 1 else None

    @property
    def gathers_once(self) -> bool:
        """Whether parameters are gathered over ``fsdp`` once a step, and not layer by layer."""
        return self.config.fsdp > 1 and self.config.fsdp_gather == "step"

    @property
    def computing(self) -> Layout:
        """The layout of the parameters that a step computes with: whole along ``fsdp`` where they are gathered once."""
        if not self.gathers_once:
            return self
        return dataclasses.replace(self, config=dataclasses.replace(self.config, fsdp_dims=()))

    def gather(self, parameters: Any, specs: Any) -> Any:
        """Parameters made whole along ``fsdp``, on each device."""
        return self._over_fsdp(gather_parameter, parameters, specs)

    def sum_into_shards(self, gradients: Any, specs: Any) -> Any:
        """Gradients of whole parameters, summed over ``fsdp``, of this device's shards; what ``fsdp`` does not divide is left."""
        return self._over_fsdp(sum_into_shard, gradients, specs)

    @staticmethod
    def _over_fsdp(exchange: Callable[[jax.Array, int], jax.Array], arrays: Any, specs: Any) -> Any:
        return jax.tree.map(
            lambda array, spec: exchange(array, tuple(spec).index(FSDP)) if FSDP in spec else array, arrays, specs
        )

    @property
    def batch(self) -> Batch:
        """How a batch is divided: rows over ``data`` and ``fsdp``, their chunks over ``sequence``."""
        rows = tuple(axis for axis in BATCH if getattr(self.config, axis) > 1) or None
        chunks = SEQUENCE if self.config.sequence > 1 else None
        row, neighbours = P(rows, chunks), P(rows, chunks, None, None)
        return Batch(row, row, row, row, row, neighbours, neighbours)

    def sharding(self, spec: P) -> NamedSharding:
        """For ``jax.device_put`` and ``jax.jit``."""
        return NamedSharding(self.mesh, spec)

    def place(self, batch: Batch, rows: int | None = None) -> Batch:
        """A batch of NumPy arrays on the devices, each array's parts on those that read them.

        Args:
            batch: this process's rows of it (:meth:`rows_here`), or all of them.
            rows: how many there are in all; None: these are all.
        """

        def put(array: np.ndarray, spec: P) -> jax.Array:
            shape = (array.shape[0] if rows is None else rows, *array.shape[1:])
            return jax.make_array_from_process_local_data(self.sharding(spec), array, shape)

        return jax.tree.map(put, batch, self.batch)

    def rows_here(self, rows: int) -> slice:
        """Which of a batch's rows the devices of this process read."""
        places = self.sharding(P(self.batch.tokens[0])).addressable_devices_indices_map((rows,)).values()
        parts = [place[0] for place in places if place is not None]
        return slice(min(part.start or 0 for part in parts), max(part.stop or rows for part in parts))

    def run(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """The function of one device's parts as a function of whole arrays.

        What devices send each other is what the function says: nothing is inserted, and a gradient that it takes is that of
        this device's part (:meth:`sum_gradients` completes it).
        """
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def sum_over_batch(self, x: Any) -> Any:
        """Sums over all devices that hold other tokens. Not to be differentiated."""
        return self._sum(x, (*BATCH, SEQUENCE))

    def sum_gradients(self, gradients: list[jax.Array], specs: list[P]) -> list[jax.Array]:
        """Gradients of parameters from what each device contributed: summed over the axes along which a parameter is not
        divided, all arrays at once. Along the others the gradient has been summed where the parameter was gathered.
        """
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, spec in enumerate(specs):
            groups.setdefault(tuple(axis for axis in AXES if axis not in spec), []).append(number)
        summed = list(gradients)
        for axes, numbers in groups.items():
            for number, array in zip(numbers, self._sum([gradients[n] for n in numbers], axes), strict=True):
                summed[number] = array
        return summed

    def _sum(self, x: Any, axes: tuple[str, ...]) -> Any:
        axes = tuple(axis for axis in axes if getattr(self.config, axis) > 1)
        return lax.psum(x, axes) if axes else x
