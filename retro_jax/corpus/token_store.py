"""Token stores in Megatron's layout: ``<prefix>.bin`` holds tokens, ``<prefix>.idx`` says where sequences and documents lie.

The index, little-endian, without padding:

    9 bytes    b"MMIDIDX\\x00\\x00"
    uint64     version, 1
    uint8      code of the tokens' dtype
    uint64     S, number of sequences
    uint64     E, entries of the document index
    int32[S]   tokens of each sequence
    int64[S]   byte offset of each sequence in .bin
    int64[E]   document index: the first sequence of each document, then S; so there are E - 1 documents

A document is the concatenation of its sequences. Written stores have one sequence a document.
Source: Megatron-LM, ``megatron/core/datasets/indexed_dataset.py``.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from retro_jax.array_files import write_array
from retro_jax.corpus.digests import digest_file
from retro_jax.errors import BadInput, UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
# Megatron's bound, a little below 2**16.
UINT16_VOCAB = 65500
COPY_ITEMS = 2**20


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron stores a vocabulary's ids in: uint16 below 65,500 entries, else int32."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB else np.int32)


def store_paths(prefix: Path) -> tuple[Path, Path]:
    """The two files of a store: ``<prefix>.bin`` and ``<prefix>.idx``."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def digest_store(prefix: Path, memo: Path | None = None) -> str:
    """SHA-256 of a store's two files; ``memo`` as in :func:`~retro_jax.corpus.digests.digest_file`."""
    digest = hashlib.sha256()
    for path in store_paths(prefix):
        if not path.is_file():
            raise UserError(f"{path} is not there; a token store is two files, give their path without .bin or .idx")
        digest.update(digest_file(path, memo).encode())
    return digest.hexdigest()


class TokenStoreWriter:
    """Writes a store front to back; memory does not grow with it. Use as a context manager: the index, without which
    there is no store, is written when the block ends without an exception."""

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self._bin_path, self._idx_path = store_paths(prefix)
        self._sizes_path = prefix.with_name(prefix.name + ".sizes.tmp")
        self._dtype = np.dtype(dtype)
        self._documents = 0

    def __enter__(self) -> TokenStoreWriter:
        self._idx_path.unlink(missing_ok=True)
        self._bin = open(self._bin_path, "wb")
        self._sizes = open(self._sizes_path, "w+b")
        return self

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens one after another, and how many each has (above 0)."""
        if lengths.sum() != len(tokens) or (lengths <= 0).any():
            raise ValueError(
                f"lengths sum to {lengths.sum()} with minimum {lengths.min(initial=1)}, but there are {len(tokens)} tokens"
            )
        write_array(self._bin, tokens.astype(self._dtype, casting="same_kind"))
        write_array(self._sizes, lengths.astype("<i4"))
        self._documents += len(lengths)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._bin.close()
            if kind is None:
                self._write_index()
        finally:
            self._sizes.close()
            self._sizes_path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        temporary = self._idx_path.with_name(self._idx_path.name + ".tmp")
        with open(temporary, "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, CODES[self._dtype], self._documents, self._documents + 1))
            for sizes in self._size_slices():
                write_array(file, sizes)
            offset = 0
            for sizes in self._size_slices():
                ends = offset + np.cumsum(sizes, dtype="<i8") * self._dtype.itemsize
                write_array(file, ends - sizes.astype("<i8") * self._dtype.itemsize)
                offset = int(ends[-1])
            for first in range(0, self._documents + 1, COPY_ITEMS):
                write_array(file, np.arange(first, min(first + COPY_ITEMS, self._documents + 1), dtype="<i8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._idx_path)

    def _size_slices(self) -> Iterator[np.ndarray]:
        self._sizes.seek(0)
        while data := self._sizes.read(4 * COPY_ITEMS):
            yield np.frombuffer(data, "<i4")


class TokenStore:
    """A store on disk, memory-mapped.

    Attributes:
        tokens: every token of ``.bin``, in the store's dtype.
        num_documents: number of documents.

    Raises:
        UserError: on opening, if a file is missing, truncated or not in this layout.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        self._bin_path, self._idx_path = store_paths(self.prefix)
        for path in (self._bin_path, self._idx_path):
            if not path.is_file():
                raise UserError(f"{path} is not there; a token store is two files, give their path without .bin or .idx")
        dtype, sequences, entries = self._read_header()
        self._sizes = _mapped(self._idx_path, "<i4", HEADER.size, sequences)
        self._pointers = _mapped(self._idx_path, "<i8", HEADER.size + 4 * sequences, sequences)
        self._index = _mapped(self._idx_path, "<i8", HEADER.size + 12 * sequences, entries)
        self.num_documents = entries - 1
        self._check_index(dtype)
        self.tokens = _mapped(self._bin_path, dtype.newbyteorder("<"), 0, self._bin_path.stat().st_size // dtype.itemsize)

    def __len__(self) -> int:
        return self.num_documents

    def document(self, number: int) -> np.ndarray:
        """One document's tokens, in the store's dtype."""
        return self.documents(number, number + 1)[0]

    def documents(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents ``first`` to ``last - 1``: their tokens one after another, and their lengths, int64."""
        start, end = int(self._index[first]), int(self._index[last])
        sizes = np.asarray(self._sizes[start:end], np.int64)
        at = np.asarray(self._pointers[start:end]) // self.tokens.dtype.itemsize
        if len(at) and np.array_equal(at[1:], (at + sizes)[:-1]):  # one run, as nearly always
            tokens = np.array(self.tokens[at[0] : at[-1] + sizes[-1]])
        else:
            tokens = np.concatenate([self.tokens[:0], *(self.tokens[a : a + n] for a, n in zip(at, sizes, strict=True))])
        return tokens, self.lengths(first, last)

    def lengths(self, first: int, last: int) -> np.ndarray:
        """Tokens of documents ``first`` to ``last - 1``, int64."""
        bounds = np.asarray(self._index[first : last + 1])
        ends = np.concatenate([[0], np.cumsum(self._sizes[bounds[0] : bounds[-1]], dtype=np.int64)])
        return np.diff(ends[bounds - bounds[0]])

    def starts(self, first: int, last: int) -> np.ndarray:
        """Where documents ``first`` to ``last - 1``, none of them empty, start in ``tokens``, int64."""
        return np.asarray(self._pointers[np.asarray(self._index[first:last])]) // self.tokens.dtype.itemsize

    def _read_header(self) -> tuple[np.dtype, int, int]:
        size = self._idx_path.stat().st_size
        with open(self._idx_path, "rb") as file:
            data = file.read(HEADER.size)
        if len(data) < HEADER.size or not data.startswith(MAGIC):
            raise BadInput(
                f"{self._idx_path} is not the index of a Megatron token store (it does not begin with MMIDIDX); check the path"
            )
        _, version, code, sequences, entries = HEADER.unpack(data)
        if version != VERSION or code not in DTYPES:
            raise BadInput(
                f"{self._idx_path} has version {version} and dtype code {code}; "
                f"only version {VERSION} with code {', '.join(map(str, DTYPES))} can be read"
            )
        expected = HEADER.size + 12 * sequences + 8 * entries
        # Multimodal stores end with one mode byte a sequence.
        if size not in (expected, expected + sequences):
            raise BadInput(f"{self._idx_path} has {size} bytes instead of {expected}; it is truncated or damaged, write it again")
        return np.dtype(DTYPES[code]), sequences, entries

    def _check_index(self, dtype: np.dtype) -> None:
        index, sequences = self._index, len(self._sizes)
        rises = all((np.diff(index[at : at + COPY_ITEMS + 1]) >= 0).all() for at in range(0, len(index), COPY_ITEMS))
        if len(index) == 0 or index[0] != 0 or index[-1] != sequences or not rises:
            raise BadInput(
                f"{self._idx_path} has a document index that does not rise from 0 to its {sequences} sequences; "
                "it is damaged, write it again"
            )
        total = self._bin_path.stat().st_size
        for at in range(0, sequences, COPY_ITEMS):
            part = slice(at, at + COPY_ITEMS)
            sizes, pointers = np.asarray(self._sizes[part], np.int64), np.asarray(self._pointers[part])
            if (sizes < 0).any() or (pointers < 0).any() or (pointers % dtype.itemsize).any():
                raise BadInput(
                    f"{self._idx_path} has sequences of negative length or at impossible places; it is damaged, write it again"
                )
            end = int((pointers + sizes * dtype.itemsize).max())
            if end > total:
                raise BadInput(
                    f"{self._bin_path} has {total} bytes, but its index reaches byte {end}; it is truncated, write it again"
                )


def _mapped(path: Path, dtype: np.dtype | str, offset: int, count: int) -> np.ndarray:
    if count == 0:
        return np.zeros(0, dtype)  # an empty range cannot be mapped
    return np.memmap(path, dtype, "r", offset, (count,))
