"""Documents from files: ``.txt`` (one a file), ``.jsonl`` (one a line; plain, gzip or zstandard), ``.parquet`` (one a row)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from retro_jax.corpus.document import Document
from retro_jax.errors import BadInput

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
READ_BYTES = 2**20
PARQUET_ROWS = 256
# Archives written with a long window (zstd --long=31) need as much memory to read.
ZSTD_WINDOW_BYTES = 2**31


def suffix_of(path: Path) -> str | None:
    """The suffix that says how the file is read, or None if it is not one of :data:`SUFFIXES`."""
    return next((suffix for suffix in reversed(SUFFIXES) if path.name.lower().endswith(suffix)), None)


def read_file(path: Path, group: str, text_field: str) -> Iterator[Document]:
    """The file's documents in order, streamed.

    Raises:
        UserError: it cannot be read, is not UTF-8, or a line or row lacks the text; the message names file and line.
    """
    suffix = suffix_of(path)
    try:
        if suffix == ".txt":
            yield Document(text=_decode(path.read_bytes(), path, 1), group=group, title=path.stem, where=str(path))
        elif suffix == ".parquet":
            yield from _read_parquet(path, group, text_field)
        else:
            yield from (_document(fields, group, text_field, where) for where, fields in read_json_lines(path))
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror or error}); check the file") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """What each line of a ``.jsonl`` file says, plain or compressed, with where it stands ("items.jsonl line 17"), streamed.

    Raises:
        UserError: a line is not UTF-8 or not JSON, or the archive is damaged.
        OSError: the file cannot be read.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        text = _decode(line, path, number)
        try:
            yield where, json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where} is not JSON ({error}); write one JSON object a line, or repair it") from None


def _document(fields: object, group: str, text_field: str, where: str) -> Document:
    if not isinstance(fields, dict):
        raise BadInput(f"{where} holds a JSON {type(fields).__name__} instead of an object; write one JSON object a line")
    text, title = fields.get(text_field), fields.get("title")
    if not isinstance(text, str):
        state = (
            f"has no field {text_field!r}" if text_field not in fields else f"has {type(text).__name__} in field {text_field!r}"
        )
        found = ", ".join(map(repr, list(fields)[:20])) or "none"
        raise BadInput(
            f"{where} {state} where a text is wanted; its fields are {found}: set CorpusConfig.text_field, or repair it"
        )
    _check_unicode(text, where)
    identifier = fields.get("id")
    return Document(
        text=text,
        group=group,
        title=title if isinstance(title, str) else "",
        where=where,
        id=str(identifier) if isinstance(identifier, (str, int)) else "",
    )


def _check_unicode(text: str, where: str) -> None:
    """JSON can spell half of a surrogate pair, which no encoding can write."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where} has a lone surrogate {text[error.start]!r}, which is not Unicode text; repair it") from None


def _decode(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise BadInput(f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8") from None


def _lines(path: Path) -> Iterator[bytes]:
    suffix = suffix_of(path)
    with open(path, "rb") as file:
        try:
            if suffix == ".jsonl.gz":
                with gzip.GzipFile(fileobj=file) as unzipped:
                    yield from unzipped
            elif suffix == ".jsonl.zst":
                yield from _split_lines(_decompress_zstd(file, path))
            else:
                yield from file
        except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
            raise BadInput(f"{path} cannot be decompressed ({error}); it is truncated or damaged, fetch it again") from None


def _decompress_zstd(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """All frames, one after another. (``stream_reader`` takes a truncated frame for the end of the file.)"""
    frame = None
    while data := file.read(READ_BYTES):
        while data:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise zstandard.ZstdError("the last frame is not complete")


def _split_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        for line in whole:
            yield b"".join(parts) + line
            parts = []
        parts.append(rest)
    if last := b"".join(parts):
        yield last


def _read_parquet(path: Path, group: str, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                found = ", ".join(map(repr, names[:20])) or "none"
                raise BadInput(f"{path} has no column {text_field!r}; its columns are {found}: set CorpusConfig.text_field")
            columns = [text_field, *(name for name in ("title", "id") if name in names and text_field != name)]
            row = 0
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for fields in batch.to_pylist():
                    row += 1
                    yield _document(fields, group, text_field, f"{path} row {row}")
    except pyarrow.ArrowException as error:
        raise BadInput(
            f"{path} cannot be read as parquet ({_first_line(error)}); it is truncated or damaged, fetch it again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
