"""Our parameters one layer at a time, by names that do not depend on how layers are stacked for the scan."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retro_jax.config import ModelConfig
from retro_jax.model.decoder import runs
from retro_jax.training.state import ModelForm, Path, Tree, model_form


@dataclass(frozen=True)
class Slot:
    """Where one layer's parameter lies: ``path`` of the array in the state, and its ``row`` there (None: the whole array)."""

    path: Path
    row: int | None
    shape: tuple[int, ...]


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every parameter by name: ``decoder.<layer>.attention.query.weight``, ``encoder.<layer>.ffn.up.bias``, ``embedding.table``;
    layers count from 0, through all stacks."""
    patterns = runs(config.num_layers, config.cca_layers)
    first_layers = list(itertools.accumulate((len(pattern) * count for pattern, count in patterns), initial=0))
    found: dict[str, Slot] = {}
    for path, fact in form_of(config).facts.items():
        if path[0] != "decoder":
            found[_name([part for part in path if part != "layers"])] = Slot(path, None, fact.shape)
            continue
        _, stack, _, _, place, *rest = path
        pattern, count = patterns[int(stack)]
        for row in range(count):
            layer = first_layers[int(stack)] + row * len(pattern) + int(place)
            found[_name(["decoder", layer, *rest])] = Slot(path, row, fact.shape[1:])
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name."""
    return {name: slot.shape for name, slot in slots(config).items()}


@functools.lru_cache(maxsize=8)  # to trace a large model takes seconds, and every table asks for its shapes
def form_of(config: ModelConfig) -> ModelForm:
    """The form of the model, all of it trained."""
    return model_form(config, lambda path: True)


def take(arrays: Mapping[Path, Any], slot: Slot) -> np.ndarray:
    """The slot's values out of arrays by path."""
    array = arrays[slot.path]
    return np.asarray(array if slot.row is None else array[slot.row])


def stacked(config: ModelConfig, named: Mapping[str, np.ndarray]) -> Tree:
    """The state's nested dict from values by name; every name must be there."""
    tree: Tree = {}
    for path, names in names_by_path(config).items():
        place = tree
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = one_array(config, [named[name] for name in names], path)
    return tree


def names_by_path(config: ModelConfig) -> dict[Path, list[str]]:
    """For each array of the state the names of what lies in it, row by row."""
    found: dict[Path, list[str]] = {}
    for name, slot in sorted(slots(config).items(), key=lambda item: item[1].row or 0):
        found.setdefault(slot.path, []).append(name)
    return found


def one_array(config: ModelConfig, values: Sequence[np.ndarray], path: Path) -> np.ndarray:
    """The state's array from the values of its names: stacked, where layers are."""
    stack = len(form_of(config).facts[path].shape) > values[0].ndim
    return np.stack(values) if stack else values[0]


def _order(name: str) -> tuple[int, int]:
    """Embeddings, decoder and encoder layer by layer, and the rest."""
    part, layer, *_ = name.split(".")
    kinds = ("embedding", "position", "decoder", "encoder")
    return kinds.index(part) if part in kinds else len(kinds), int(layer) if layer.isdecimal() else 2**31


def _name(parts: list[str | int]) -> str:
    return ".".join(map(str, parts))
