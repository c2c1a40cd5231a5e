"""SHA-256 of input files. Large ones are read once: their digest is kept in a memo as long as size and time stay."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from retro_jax.artefact import write_text
from retro_jax.errors import UserError

MEMO = "digests.json"
# Smaller files are read anew by each process.
MEMO_FROM_BYTES = 64 * 2**20


def digest_file(path: Path, memo: Path | None = None) -> str:
    """SHA-256 of a file's bytes, hexadecimal.

    Args:
        path: the file.
        memo: a JSON file of digests of large files, with their size and modification time; None: none is kept.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        stat = path.stat()
        if memo is None or stat.st_size < MEMO_FROM_BYTES:
            return _digest(path.resolve(), stat.st_size, stat.st_mtime_ns)
        return _remembered(path.resolve(), [stat.st_size, stat.st_mtime_ns], memo)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path} ({error.strerror}); check the file") from None


def _remembered(path: Path, state: list[int], memo: Path) -> str:
    found = _read_memo(memo).get(str(path), [])
    if found[:2] == state:
        return found[2]
    digest = _digest(path, *state)
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_text(memo, json.dumps(_read_memo(memo) | {str(path): [*state, digest]}, indent=1, sort_keys=True))
    return digest


def _read_memo(memo: Path) -> dict[str, list]:
    try:
        return json.loads(memo.read_text())
    except (FileNotFoundError, ValueError):
        return {}  # as good as none: what is missing is read again


@functools.lru_cache(maxsize=2**16)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
