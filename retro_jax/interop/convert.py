"""From one format to another, tensor by tensor, by way of our names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from retro_jax.config import ModelConfig
from retro_jax.errors import UserError
from retro_jax.interop.files import Fact, Source
from retro_jax.interop.format import Entry, Format, entries
from retro_jax.interop.slots import shapes_of

# Names told in full where many are wrong.
TOLD = 8


class AsOurs:
    """A checkpoint in a format, read under our names.

    Raises:
        UserError: tensors are missing, unexpected or of another shape, or a tied output table differs from the embedding.
    """

    def __init__(self, source: Source, theirs: Format, config: ModelConfig) -> None:
        self._source, self._shapes = source, shapes_of(config)
        self._entries = entries(config, theirs)
        self._of = {name: entry for entry in self._entries for name in entry.ours}
        self.skipped = _check(source.facts, theirs, config, self._entries, self._shapes)
        if config.tied_embedding and theirs.tied_output in source.facts:
            table = self._of["embedding.table"].theirs[0]
            if not np.array_equal(source.read(theirs.tied_output), source.read(table)):
                raise UserError(f"{theirs.tied_output} differs from {table}, but the config says that they are tied")
        self.facts = {name: Fact(shape, source.facts[self._of[name].theirs[0]].dtype) for name, shape in self._shapes.items()}
        self._unpack = lru_cache(maxsize=1)(self._unpacked)  # two of ours often lie in one of theirs, one after the other

    def read(self, name: str) -> np.ndarray:
        entry = self._of[name]
        return self._unpack(entry)[entry.ours.index(name)]

    def correspondences(self) -> list[Entry]:
        """What is read from where."""
        return self._entries

    def _unpacked(self, entry: Entry) -> list[np.ndarray]:
        tensors = [finite(name, self._source.read(name)) for name in entry.theirs]
        shapes = [self._shapes[name] for name in entry.ours]
        if entry.split == "vocabulary":  # without the rows that pad it
            tensors = [tensor[: shape[0]] for tensor, shape in zip(tensors, shapes, strict=True)]
        return entry.layout.unpack(tensors, shapes)


@dataclass(frozen=True)
class Written:
    """What a format will hold: every tensor with its shape, in the order in which :meth:`tensors` gives them."""

    ours: Source
    entries: list[Entry]
    facts: dict[str, Fact]

    @classmethod
    def of(
        cls, ours: Source, theirs: Format, config: ModelConfig, *, dtype: np.dtype | None = None, vocab_multiple: int = 1
    ) -> Written:
        """A checkpoint under our names as it will stand in a format, in ``dtype`` or its own; vocabularies are padded with zeros
        to a multiple.

        Raises:
            UserError: the format has no place for a parameter.
        """
        found = entries(config, theirs)
        shapes, facts = shapes_there(found, shapes_of(config)), {}
        for entry in found:
            for name in entry.theirs:
                shape = shapes[name]
                if entry.split == "vocabulary":
                    shape = (-(-shape[0] // vocab_multiple) * vocab_multiple, *shape[1:])
                facts[name] = Fact(shape, dtype or ours.facts[entry.ours[0]].dtype)
        return cls(ours, found, facts)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """One entry's tensors at a time."""
        for entry in self.entries:
            packed = entry.layout.pack([self.ours.read(name) for name in entry.ours])
            for name, tensor in zip(entry.theirs, packed, strict=True):
                yield name, _padded(tensor, self.facts[name].shape)


def _padded(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """With rows of zeros, where the format wants more."""
    if tensor.shape == shape:
        return tensor
    return np.concatenate([tensor, np.zeros((shape[0] - len(tensor), *shape[1:]), tensor.dtype)])


def shapes_there(found: Iterable[Entry], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the format's tensors by name, from those of our parameters."""
    there: dict[str, tuple[int, ...]] = {}
    for entry in found:
        nothing = [np.broadcast_to(np.zeros((), np.bool_), shapes[name]) for name in entry.ours]
        there.update(zip(entry.theirs, (tensor.shape for tensor in entry.layout.pack(nothing)), strict=True))
    return there


def _check(
    facts: Mapping[str, Fact], theirs: Format, config: ModelConfig, found: list[Entry], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Refuse what does not fit, and list what is skipped."""
    wanted = shapes_there(found, shapes)
    extra = [name for name in facts if name not in wanted]
    known = re.compile("|".join(theirs.not_weights) or r"(?!)")
    skipped = [name for name in extra if known.fullmatch(name) or (config.tied_embedding and name == theirs.tied_output)]
    padded = {name for entry in found if entry.split == "vocabulary" for name in entry.theirs}
    unexpected = [name for name in extra if name not in skipped]
    refuse_misfit(facts, wanted, unexpected, f"the checkpoint does not fit the config as {theirs.name}", padded)
    return skipped


def refuse_misfit(
    facts: Mapping[str, Fact],
    wanted: Mapping[str, tuple[int, ...]],
    unexpected: Sequence[str],
    what: str,
    padded: Collection[str] = (),
) -> None:
    """Refuse a checkpoint whose tensors are not those that are wanted.

    Args:
        facts: the checkpoint's tensors.
        wanted: names and shapes; of those in ``padded`` there may be more rows.
        unexpected: tensors of the checkpoint that nobody wants.
        what: how the message begins.

    Raises:
        UserError: some are missing, unexpected or of another shape; it lists them.
    """
    wrong = {
        "missing": [name for name in wanted if name not in facts],
        "unexpected": unexpected,
        "of another shape": [
            f"{name} {facts[name].shape}, wanted {shape}"
            for name, shape in wanted.items()
            if name in facts and not _fits(facts[name].shape, shape, padded=name in padded)
        ],
    }
    told = [f"{len(names)} {kind}: {_list(names)}" for kind, names in wrong.items() if names]
    if told:
        raise UserError(f"{what}; " + "; ".join(told))


def _fits(there: tuple[int, ...], wanted: tuple[int, ...], *, padded: bool) -> bool:
    """A padded table may have more rows."""
    return there == wanted or (padded and there[1:] == wanted[1:] and there[0] > wanted[0])


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:TOLD]) + (f" and {len(names) - TOLD} more" if len(names) > TOLD else "")


def finite(name: str, tensor: np.ndarray) -> np.ndarray:
    """The tensor.

    Raises:
        UserError: it holds a number that is not finite.
    """
    if not np.isfinite(tensor).all():
        raise UserError(f"{name} holds numbers that are not finite; the checkpoint is broken")
    return tensor
