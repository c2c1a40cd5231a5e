"""What a format is: for each of our modules, where it lies there and how its tensors are laid out; and the correspondences that
follow for a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from retro_jax.config import ModelConfig
from retro_jax.errors import UserError
from retro_jax.interop.layouts import SAME, Layout
from retro_jax.interop.slots import Slot, slots

# How a tensor is dealt to tensor-parallel ranks: whole to each; by rows or columns; by rows of each half, which stand one
# below the other (gate and up); by rows, padded to a multiple.
Split = Literal["whole", "rows", "columns", "rows of halves", "vocabulary"]


@dataclass(frozen=True)
class Entry:
    """Some of our tensors are these tensors of theirs: by names within a module in the tables, by whole names in
    :func:`entries`."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout
    split: Split = "whole"


@dataclass(frozen=True)
class Format:
    """A naming scheme.

    ``prefixes`` by place and module ("decoder.norm_ffn"; places are "decoder", "decoder with cca", "encoder", "conditioned
    encoder", where the longer name wins, and "model") with ``{layer}``, and for the encoder ``{first}``, the decoder layer
    that holds it. ``tables`` by kind of module. ``not_weights``: patterns of their tensors that are none. ``tied_output``: what
    their output table is called, which a checkpoint with tied embeddings may hold a second time.
    """

    name: str
    prefixes: Mapping[str, str]
    tables: Mapping[str, Sequence[Entry]]
    not_weights: tuple[str, ...] = ()
    tied_output: str = ""


# The kind of each module, which names its table.
KINDS = {
    "embedding": "table",
    "position": "positions",
    "output": "table",
    "final_norm": "norm",
    "norm_attention": "norm",
    "norm_cca": "norm",
    "norm_cross": "norm",
    "norm_ffn": "norm",
    "attention": "self-attention",
    "cca": "cross-attention",
    "cross": "cross-attention",
    "ffn": "feed-forward",
}
PLACES = {"decoder with cca": "decoder", "conditioned encoder": "encoder"}


# Our own names, for files that need no JAX to be read.
OURS = Format("retro", {}, {})


def entries(config: ModelConfig, target: Format) -> list[Entry]:
    """All correspondences between a model's parameters and the format's tensors, in our order.

    Raises:
        UserError: the format has no place for a parameter.
    """
    if target is OURS:
        return [Entry((name,), (name,), SAME) for name in slots(config)]
    modules: dict[tuple[str, int, str], dict[str, Slot]] = {}
    for name, slot in slots(config).items():
        modules.setdefault(_module(name), {})[_within(name)] = slot
    found = []
    for (part, layer, module), tensors in modules.items():
        prefix, head = _prefix(config, target, part, layer, module), _ours(part, layer, module)
        left = list(tensors)
        for entry in target.tables[KINDS[module]]:
            if entry.ours[0] in left and set(entry.ours) <= set(tensors):  # a gate may count for a weight and a bias
                left = [name for name in left if name not in entry.ours]
                ours, theirs = tuple(head + name for name in entry.ours), tuple(prefix + name for name in entry.theirs)
                halves = entry.split == "rows of halves" and config.activation != "swiglu"
                found.append(Entry(ours, theirs, entry.layout, "rows" if halves else entry.split))
        if left:
            raise UserError(f"{target.name} has no place for {head}{left[0]}")
    return found


def _module(name: str) -> tuple[str, int, str]:
    parts = name.split(".")
    if parts[0] in ("decoder", "encoder") and parts[1].isdecimal():
        return parts[0], int(parts[1]), parts[2]
    return ("encoder", -1, parts[1]) if parts[0] == "encoder" else ("model", -1, parts[0])


def _within(name: str) -> str:
    part, layer, module = _module(name)
    return name.removeprefix(_ours(part, layer, module))


def _ours(part: str, layer: int, module: str) -> str:
    return ".".join([part] * (part != "model") + [str(layer)] * (layer >= 0) + [module, ""])


def _prefix(config: ModelConfig, target: Format, part: str, layer: int, module: str) -> str:
    place = part
    if part == "decoder" and layer + 1 in config.cca_layers:
        place = "decoder with cca"
    elif part == "encoder" and layer == 0 and config.retro is not None and config.retro.encoder.conditioning == "decoder":
        place = "conditioned encoder"
    elif part == "encoder" and layer < 0:
        place = "encoder itself"
    for found in (place, PLACES.get(place)):
        if f"{found}.{module}" in target.prefixes:
            first = min(config.cca_layers, default=0) - 1
            return target.prefixes[f"{found}.{module}"].format(layer=layer, first=first)
    raise UserError(f"{target.name} has no place for {_ours(part, layer, module)}")
