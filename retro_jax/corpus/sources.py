"""Where documents come from: one function to read any source, one to fingerprint it."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from retro_jax.corpus.digests import digest_file
from retro_jax.corpus.document import Document
from retro_jax.corpus.python_docs import python_docs_fingerprint, python_documents
from retro_jax.corpus.text_files import SUFFIXES, read_file, suffix_of
from retro_jax.corpus.token_store import digest_store
from retro_jax.errors import UserError

__all__ = ["MEGATRON", "PYTHON_DOCS", "TFDS", "Document", "read_documents", "source_fingerprint"]

PYTHON_DOCS = "python-docs"
TFDS = "tfds:"
MEGATRON = "megatron:"
ALLOWED = (
    f"allowed are {PYTHON_DOCS}, files ({', '.join(SUFFIXES)}), folders and globs of them, "
    f"{TFDS}<dataset>[/config][:split] and {MEGATRON}<prefix of .bin and .idx>"
)


def read_documents(source: str, *, text_field: str = "text") -> Iterator[Document]:
    """The documents of one source in a fixed order, streamed.

    Args:
        source: ``python-docs``, a file, a folder, a glob or ``tfds:...``; see :class:`~retro_jax.config.CorpusConfig`.
        text_field: the field of a JSON line, the column of a parquet file or the feature of a tfds example that holds the text.

    Raises:
        UserError: the source is unknown or not there, or a document cannot be read; the message names file and line.
    """
    if source == PYTHON_DOCS:
        yield from python_documents()
    elif source.startswith(TFDS):
        from retro_jax.corpus.tfds_source import read_tfds

        yield from read_tfds(source, text_field)
    elif source.startswith(MEGATRON):
        raise UserError(
            f"source {source!r} holds tokens, not text; train a tokenizer on other sources, or load the one that made it"
        )
    else:
        for path, name in _files_of(source):
            yield from read_file(path, name, text_field)


def source_fingerprint(source: str, memo: Path | None = None) -> str:
    """A name and a digest of everything in the source, so that an artefact built from it can tell when it changed.

    Args:
        source: as for :func:`read_documents`, or ``megatron:<prefix>``.
        memo: where digests of large files are kept; see :func:`~retro_jax.corpus.digests.digest_file`.

    Raises:
        UserError: the source is unknown or not there.
    """
    if source == PYTHON_DOCS:
        return python_docs_fingerprint()
    if source.startswith(TFDS):
        from retro_jax.corpus.tfds_source import tfds_fingerprint

        return tfds_fingerprint(source, memo)
    if source.startswith(MEGATRON):
        prefix = Path(source.removeprefix(MEGATRON))
        return f"{MEGATRON}{prefix.name}:{digest_store(prefix, memo)[:16]}"
    digest = hashlib.sha256()
    for path, name in _files_of(source):
        digest.update(f"{name}\0{digest_file(path, memo)}\0".encode())
    return f"{Path(source).name}:{digest.hexdigest()[:16]}"


def _files_of(source: str) -> list[tuple[Path, str]]:
    """The source's files, sorted, each with its name within the source (which is its documents' group)."""
    source = os.path.expanduser(source)
    path = Path(source)
    if path.is_file():
        if suffix_of(path) is None:
            raise UserError(f"source {source!r} ends in none of {', '.join(SUFFIXES)}; convert it, or rename it to what it is")
        return [(path, path.name)]
    if path.is_dir():
        return _files_in(path, source)
    if not glob.has_magic(source):
        raise UserError(f"source {source!r} is neither a known source nor an existing file or folder; {ALLOWED}")
    matches = sorted(Path(match) for match in glob.glob(source, recursive=True))
    wanted = [match for match in matches if match.is_file() and suffix_of(match)]
    if not wanted:
        matched = f"matches {len(matches)} paths, none a file" if matches else "matches no file"
        raise UserError(f"source {source!r} {matched} that ends in one of {', '.join(SUFFIXES)}; check the pattern")
    root = _fixed_part(source)
    return [(match, str(match.relative_to(root))) for match in wanted]


def _files_in(folder: Path, source: str) -> list[tuple[Path, str]]:
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and suffix_of(path))
    wanted = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not wanted:
        raise UserError(f"source {source!r} is a folder without files that end in one of {', '.join(SUFFIXES)}; check the folder")
    return [(folder / name, str(name)) for name in wanted]


def _fixed_part(pattern: str) -> Path:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])
