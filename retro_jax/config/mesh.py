"""Settings of the mesh: how many devices share which part of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retro_jax.config.checks import check, check_choice, check_positive


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis has; their product is the number of devices that a run takes.

    ``data``: each device has its own rows and all parameters. ``fsdp``: each has its own rows and a part of every parameter and
    of its optimizer state, gathered to compute with. ``sequence``: each has some of a row's chunks. ``tensor``: each has some of
    the heads, of the feed-forward's columns and of the vocabulary, and between them a share of the tokens (Megatron's tensor
    and sequence parallelism). Devices along ``tensor`` send the most, those along ``data`` the least.

    ``fsdp_dims``: the logical dims of parameters that ``fsdp`` divides. ``fsdp_gather``: "layer" gathers the parameters of each
    layer where it is computed, in every part of ``TrainConfig.accumulate``; "step" all of them once a step: less is sent with
    two parts or more, and whole gradients and the copy to compute with take memory.
    """

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    fsdp_dims: tuple[str, ...] = ("width", "kv_width")
    fsdp_gather: Literal["layer", "step"] = "layer"

    def __post_init__(self) -> None:
        check_positive(self, "data", "fsdp", "sequence", "tensor")
        check_choice(self, "fsdp_gather", ("layer", "step"))
        known = ("width", "kv_width", "head_dim", "position")
        for dim in self.fsdp_dims:
            check(dim in known, f"MeshConfig.fsdp_dims names {dim!r}; choose from {', '.join(known)}")

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.data * self.fsdp * self.sequence * self.tensor
