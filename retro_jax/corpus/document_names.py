"""The ids and titles of documents, beside the token stores: who reads a neighbour, or measures a search, asks for them.

For each source and split ``<i>-<split>.names`` holds the documents' ids and titles one after another in UTF-8, and
``<i>-<split>.name_ends``, int64 little-endian [documents, 2], where in it each id and each title ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from retro_jax.array_files import write_array
from retro_jax.artefact import open_artefact
from retro_jax.config import Split

NAMES, ENDS = ".names", ".name_ends"
READ_AT_ONCE = 2**16


class DocumentName(NamedTuple):
    """What the source calls a document; "" where it does not."""

    id: str
    title: str


def encode_names(names: Sequence[DocumentName]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all ids and titles in order, uint8, and how many each has, int64 [documents, 2]. What is no Unicode text (half
    of a surrogate pair, which JSON can spell) becomes "?"."""
    parts = [[part.encode(errors="replace") for part in name] for name in names]
    lengths_D2 = np.array([[len(part) for part in name] for name in parts], np.int64).reshape(-1, 2)
    return np.frombuffer(b"".join(part for name in parts for part in name), np.uint8), lengths_D2


class DocumentNamesWriter:
    """Writes the names of one source and split front to back. Use as a context manager."""

    def __init__(self, prefix: Path) -> None:
        self._paths = _paths(prefix)
        self._end = 0

    def __enter__(self) -> DocumentNamesWriter:
        names, ends = self._paths
        self._names, self._ends = open(names, "wb"), open(ends, "wb")
        return self

    def add(self, data: np.ndarray, lengths_D2: np.ndarray) -> None:
        """Append documents, as :func:`encode_names` gives them."""
        ends_D2 = self._end + np.cumsum(lengths_D2.reshape(-1)).reshape(-1, 2)
        write_array(self._names, data)
        write_array(self._ends, ends_D2.astype("<i8"))
        self._end = int(ends_D2[-1, 1]) if len(ends_D2) else self._end

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._names.close()
        self._ends.close()


class DocumentNames:
    """The ids and titles of one split's documents over all sources, numbered as in the chunk table; read where asked for.

    Documents of a ``tokens`` artefact that was built before names were kept have none.
    """

    def __init__(self, tokens: Path, split: Split) -> None:
        artefact = open_artefact(tokens, "tokens")
        counts = [source["splits"][split]["documents"] for source in artefact.summary["sources"]]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._stores = [_open_names(artefact.path / f"{i}-{split}", count) for i, count in enumerate(counts)]

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, documents_D: np.ndarray) -> list[DocumentName]:
        """The names of documents, by number."""
        sources_D = np.searchsorted(self._first, documents_D, side="right") - 1
        return [
            self._stores[source].name(document - self._first[source])
            for document, source in zip(documents_D, sources_D, strict=True)
        ]

    def find(self, ids: Collection[str]) -> dict[str, list[int]]:
        """The documents that have these ids, by id; an id that none has is left out."""
        found: dict[str, list[int]] = {}
        for first, store in zip(self._first, self._stores, strict=False):
            for number, name in enumerate(store.ids()):
                if name in ids:
                    found.setdefault(name, []).append(int(first) + number)
        return found


class _Store:
    """One source's names, mapped."""

    def __init__(self, data: np.ndarray, ends_D2: np.ndarray) -> None:
        self._data, self._ends_D2 = data, ends_D2

    def name(self, number: int) -> DocumentName:
        start = int(self._ends_D2[number - 1, 1]) if number else 0
        middle, end = (int(at) for at in self._ends_D2[number])
        return DocumentName(self._data[start:middle].tobytes().decode(), self._data[middle:end].tobytes().decode())

    def ids(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self._ends_D2), READ_AT_ONCE):
            ends = self._ends_D2[first : first + READ_AT_ONCE].tolist()
            data = self._data[start : ends[-1][1]].tobytes()
            origin = start
            for middle, end in ends:
                yield data[start - origin : middle - origin].decode()
                start = end


class _NoNames(_Store):
    """Of documents that the source gives no names."""

    def __init__(self, count: int) -> None:
        super().__init__(np.zeros(0, np.uint8), np.broadcast_to(np.int64(0), (count, 2)))


def _open_names(prefix: Path, count: int) -> _Store:
    names, ends = _paths(prefix)
    if not names.exists() or names.stat().st_size == 0:
        return _NoNames(count)
    return _Store(np.memmap(names, np.uint8, "r"), np.memmap(ends, "<i8", "r", shape=(count, 2)))


def _paths(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + NAMES), prefix.with_name(prefix.name + ENDS)
