"""Tensor parallelism of Megatron's checkpoints: whole tensors dealt to ranks, and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from retro_jax.errors import UserError
from retro_jax.interop.files import Fact, Source
from retro_jax.interop.format import Split


def deal(tensor: np.ndarray, split: Split, ranks: int) -> list[np.ndarray]:
    """Each rank's part.

    Raises:
        UserError: the dim that is split is not a multiple of ``ranks``.
    """
    if split == "whole":
        return [tensor] * ranks
    if split == "rows of halves":
        return [np.concatenate(pair) for pair in zip(*(deal(half, "rows", ranks) for half in np.split(tensor, 2)), strict=True)]
    axis = 1 if split == "columns" else 0
    if tensor.shape[axis] % ranks:
        raise UserError(
            f"a tensor of shape {tensor.shape} cannot be dealt to {ranks} ranks; use a --tensor-parallel that divides it"
        )
    return np.split(tensor, ranks, axis)


def put_together(parts: Sequence[np.ndarray], split: Split) -> np.ndarray:
    """The whole tensor; the inverse of :func:`deal`. Of parts that every rank has whole, the first."""
    if split == "whole" or len(parts) == 1:
        return parts[0]
    if split == "rows of halves":
        halves = zip(*(np.split(part, 2) for part in parts), strict=True)
        return np.concatenate([np.concatenate(of_ranks) for of_ranks in halves])
    return np.concatenate(parts, axis=1 if split == "columns" else 0)


class RanksSource:
    """The checkpoints of all ranks, read as one."""

    def __init__(self, ranks: Sequence[Source], splits: Mapping[str, Split]) -> None:
        self._ranks, self._splits = ranks, splits
        first = ranks[0].facts
        for number, rank in enumerate(ranks):
            if differing := sorted(set(first) ^ set(rank.facts)):
                raise UserError(f"rank {number} and rank 0 do not have the same tensors: {differing[0]} is in one of them only")
        self.facts = {name: Fact(self._shape(name), fact.dtype) for name, fact in first.items()}

    def read(self, name: str) -> np.ndarray:
        parts = [rank.read(name) for rank in self._ranks]
        split = self._splits.get(name, "whole")
        if split == "whole" and not all(np.array_equal(part, parts[0], equal_nan=True) for part in parts[1:]):
            raise UserError(f"the ranks hold different {name}, which every one of them should hold whole")
        return put_together(parts, split)

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes, split = [rank.facts[name].shape for rank in self._ranks], self._splits.get(name, "whole")
        axis = 1 if split == "columns" else 0
        if split == "whole" or len(shapes[0]) <= axis:
            return shapes[0]
        whole = sum(shape[axis] for shape in shapes)
        return (*shapes[0][:axis], whole, *shapes[0][axis + 1 :])
