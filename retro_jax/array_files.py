"""``.npy`` files written by ordinary writes, so that a full disk is an OSError that says so: ``np.save`` and ``tofile`` lose the
reason, and a write into a mapped file ends the process with a signal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike


def save_array(path: Path, array: np.ndarray) -> None:
    """``np.save``, always in C order."""
    with array_file(path, array.dtype, array.shape) as append:
        append(array)


@contextmanager
def array_file(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> Iterator[Callable[[np.ndarray], None]]:
    """An array of known shape, written a slice of its first axis at a time.

    Yields:
        What appends a slice; it is cast to ``dtype``.

    Raises:
        ValueError: at the end, if the slices are not as many rows as ``shape`` says.
    """
    dtype, rows = np.dtype(dtype), 0
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

        def append(part: np.ndarray) -> None:
            nonlocal rows
            write_array(file, part.astype(dtype, copy=False))
            rows += len(part)

        yield append
    if rows != shape[0]:
        raise ValueError(f"{path} is to have {shape[0]} rows, {rows} were written")


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """``array.tofile(file)``."""
    file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
