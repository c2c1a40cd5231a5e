"""The source ``tfds:<dataset>[/config][:split]``: TensorFlow Datasets stored as array_record, read without TensorFlow."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retro_jax.corpus.digests import digest_file
from retro_jax.corpus.document import Document
from retro_jax.errors import BadInput, UserError

PREFIX = "tfds:"
_SPEC = re.compile(r"(?P<name>[\w/.+\-]+(?::\d+\.\d+\.\d+)?)(?::(?P<split>.+))?")


def read_tfds(source: str, text_field: str) -> Iterator[Document]:
    """The texts of a data set that is prepared already, in its order; nothing is downloaded. Without a split, ``train``.

    Raises:
        UserError: the data set is not there, lacks the split or the text field, or is not stored as array_record.
    """
    examples = _open(source)
    for number in range(len(examples)):
        fields = examples[number]
        text = _text(fields.get(text_field))
        where = f"{source} example {number}"
        if text is None:
            found = ", ".join(map(repr, fields))
            raise BadInput(f"{where} has no UTF-8 text in {text_field!r}; its features are {found}: set CorpusConfig.text_field")
        title, identifier = (_text(fields.get(name)) or "" for name in ("title", "id"))
        yield Document(text=text, group=str(number), title=title, where=where, id=identifier)


def tfds_fingerprint(source: str, memo: Path | None) -> str:
    """Name of the data set, and a digest of its files and of the split asked for."""
    info = _open(source).dataset_info
    digest = hashlib.sha256(source.encode())
    for path in sorted(path for path in Path(info.data_dir).iterdir() if path.is_file()):
        digest.update(f"{path.name}\0{digest_file(path, memo)}\0".encode())
    return f"{PREFIX}{info.full_name}:{digest.hexdigest()[:16]}"


def _open(source: str) -> Any:
    import tensorflow_datasets as tfds

    match = _SPEC.fullmatch(source.removeprefix(PREFIX))
    if match is None:
        raise UserError(f"source {source!r} is not tfds:<dataset>[/config][:split], for example tfds:wiki40b/en:train")
    try:
        return tfds.data_source(match["name"], split=match["split"] or "train", download=False)
    except Exception as error:  # of many kinds: unknown, not prepared, other format, unknown split
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        raise UserError(
            f"source {source!r} cannot be opened ({type(error).__name__}: {reason}); "
            f"it must be prepared in {folder} (TFDS_DATA_DIR), as `tfds build {match['name']} --file_format=array_record` does"
        ) from error


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) else None
