"""What the backward pass finds saved, and what it computes again: names of a layer's arrays and policies over them.

``stream`` the residual stream, which is saved between layers under every policy (2 bytes x tokens x width in bfloat16), and
inside a layer after each sub-layer. ``<part>_in`` the normed stream that a sub-layer reads; ``<part>_gathered`` the same of all
tokens, where it is divided over devices; ``query``, ``key``, ``value`` as attention reads them; ``out`` and ``lse`` attention's
result and the log-sum-exp of its scores; ``ffn_up`` the feed-forward before its activation. ``cross`` is the encoder's attention
to the chunk that asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from retro_jax.config.checks import check, check_choice

RecomputePolicy = Literal["none", "selective", "full", "offload"]
Action = Literal["save", "recompute", "offload"]

ATTENTIONS = ("attention", "cca", "cross")
ARRAYS = ("in", "gathered", "query", "key", "value", "out", "lse")
NAMES = (
    *(f"{part}_{array}" for part in ATTENTIONS for array in ARRAYS),
    *("ffn_in", "ffn_gathered", "ffn_up", "after_attention", "after_cca"),
)
GATHERED = tuple(name for name in NAMES if name.endswith("_gathered"))
POLICIES: dict[str, dict[str, Action]] = {
    "selective": {name: "recompute" if name in GATHERED else "save" for name in NAMES},
    "full": dict.fromkeys(NAMES, "recompute"),
    "offload": {
        name: "recompute" if name in GATHERED else "save" if name.endswith("_lse") else "offload" for name in NAMES
    },
}  # fmt: skip


class Part(NamedTuple):
    """A sub-layer's name, whether its backward pass gathers again what its forward pass gathered, and whether each device along
    ``tensor`` computes it ``alone``, for tokens of its own and with whole weights, or all of them together in parts."""

    name: str
    gathers_again: bool
    alone: bool


@dataclass(frozen=True)
class Recompute:
    """A policy with its exceptions; None: what each operation reads in its backward pass is saved, all but what was gathered."""

    actions: tuple[tuple[str, Action], ...] | None = None

    @classmethod
    def of(cls, policy: RecomputePolicy, exceptions: Sequence[str] = ()) -> Recompute:
        """The policy with exceptions "name=action".

        Raises:
            ValueError: an unknown policy, name or action.
        """
        if policy == "none":
            check(not exceptions, f"ModelConfig.recompute_names={tuple(exceptions)} change nothing of recompute='none'")
            return cls()
        table = dict(POLICIES[policy])
        for exception in exceptions:
            name, _, action = exception.partition("=")
            check(
                name in NAMES and action in ("save", "recompute", "offload"),
                f"ModelConfig.recompute_names has {exception!r}; write NAME=save, =recompute or =offload with a NAME of "
                f"{', '.join(NAMES)}",
            )
            table[name] = action  # type: ignore[assignment]
        return cls(tuple(table.items()))

    def action(self, name: str) -> Action:
        """What happens to the array of this name."""
        if self.actions is None:
            return "recompute" if name in GATHERED else "save"
        return dict(self.actions)[name]

    def names(self, action: Action) -> list[str]:
        """All names with this action."""
        return [name for name, own in self.actions or () if own == action]

    def part(self, name: str, *, alone: bool = False) -> Part:
        """The sub-layer of this name. Its backward pass gathers its input again where its share is saved and the whole is not."""
        again = self.action(f"{name}_gathered") == "recompute" and self.action(f"{name}_in") != "recompute"
        return Part(name, again, alone)


def check_recompute(config: object, policy: RecomputePolicy, exceptions: Sequence[str]) -> None:
    """The policy exists, and its exceptions name arrays and actions."""
    check_choice(config, "recompute", ("none", *POLICIES))
    Recompute.of(policy, exceptions)
