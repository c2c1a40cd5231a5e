"""Settings of who computes the blocks of the data stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retro_jax.config.checks import check, check_choice, check_positive


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """Who computes the blocks of the data stages; what they hold does not depend on it.

    ``local``: processes of this machine. ``ray``: actors of a Ray cluster that is there already, found at ``address``
    ("auto": the one that this machine belongs to or ``RAY_ADDRESS`` names, else "host:port"); all its machines see the data
    folder at the same path. ``CorpusConfig.workers`` and ``RetrievalConfig.workers`` say how many compute at a time. ``gpus``:
    GPUs that a Ray actor asks for where one embedder keeps a device busy. ``attempts``: a block that fails so often is given up.
    """

    kind: Literal["local", "ray"] = "local"
    address: str = "auto"
    gpus: float = 0.0
    attempts: int = 3

    def __post_init__(self) -> None:
        check_choice(self, "kind", ("local", "ray"))
        check_positive(self, "attempts")
        check(self.address != "", "ExecutorConfig.address is empty; give 'auto' or the 'host:port' of a Ray cluster")
        check(self.gpus >= 0, f"ExecutorConfig.gpus={self.gpus} must not be negative")
        check(
            self.gpus <= 1 or self.gpus == int(self.gpus),
            f"ExecutorConfig.gpus={self.gpus} is neither whole nor a share of one GPU; use {max(1, round(self.gpus))}",
        )
        check(
            self.kind == "ray" or self.gpus == 0,
            f"ExecutorConfig.gpus={self.gpus} asks Ray for GPUs, but kind='local' takes the GPUs that it sees; set kind='ray', "
            "or gpus=0",
        )
