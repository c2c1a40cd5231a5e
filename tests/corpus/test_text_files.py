"""Files of documents: what is read, and how what cannot be read is told."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.corpus.document import Document
from retro_jax.corpus.sources import read_documents
from retro_jax.errors import UserError

ROWS = [{"text": "one\nline", "title": "A"}, {"text": "zwei é \U0001f600 \u2028 end", "id": 3}, {"text": ""}]


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def frames(data: bytes) -> bytes:
    """Two zstandard frames, split in the middle of a line, the first without its size in the header."""
    half = len(data) // 2
    streamed = zstandard.ZstdCompressor().compressobj()
    return streamed.compress(data[:half]) + streamed.flush() + zstandard.compress(data[half:])


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": lambda data: data,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.zst": frames,
    "no_last_newline.jsonl": lambda data: data[:-1],
    "bom.jsonl": lambda data: b"\xef\xbb\xbf" + data,
    "windows.jsonl": lambda data: data.replace(b"\n", b"\r\n"),
    "blank.jsonl": lambda data: data.replace(b"\n", b"\n\n"),
}


@pytest.mark.parametrize("name", PACKED)
def test_json_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PACKED[name](json_lines(ROWS)))
    documents = list(read_documents(str(path)))
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert [document.title for document in documents] == ["A", "", ""]
    assert {document.group for document in documents} == {name}
    third = 5 if name == "blank.jsonl" else 3
    assert documents[2].where == f"{path} line {third}"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(), max_size=8), st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str], suffix: str) -> None:
    path = tmp_path_factory.mktemp("source") / f"a{suffix}"
    data = json_lines([{"body": text} for text in texts])
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table({"body": pa.array(texts, pa.string())}), path, row_group_size=3)
    else:
        path.write_bytes({".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix](data))
    assert [document.text for document in read_documents(str(path), text_field="body")] == texts


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffEin Satz.\r\n\r\nNoch é.\n".encode())
    assert list(read_documents(str(path))) == [Document("Ein Satz.\r\n\r\nNoch é.\n", "book.txt", "book", str(path))]


def test_parquet_titles_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"n": [1, 2], "text": ["x", "y"], "title": ["T", None]}), path)
    assert list(read_documents(str(path))) == [
        Document("x", "a.parquet", "T", f"{path} row 1"),
        Document("y", "a.parquet", "", f"{path} row 2"),
    ]


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


LONG = json_lines([{"text": "word " * 5000}, {"text": "more"}])
BAD = {
    "utf8.txt": (b"fine\nalso\nbad \xff here", "utf8.txt line 3 is not UTF-8 .byte 0xff."),
    "utf8.jsonl": (b'{"text": "x"}\n{"text": "\xe9"}\n', "utf8.jsonl line 2 is not UTF-8 .byte 0xe9."),
    "json.jsonl": (b'{"text": "x"}\n\n{"text": "x"\n', "json.jsonl line 3 is not JSON"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "deep.jsonl line 1 is not JSON"),
    "number.jsonl": (b'{"text": 1' + b"0" * 5000 + b"}\n", "number.jsonl line 1 is not JSON"),
    "list.jsonl": (b'["text"]\n', "list.jsonl line 1 holds a JSON list instead of an object"),
    "field.jsonl": (b'{"body": "x", "id": 1}\n', "field.jsonl line 1 has no field 'text' .* its fields are 'body', 'id'"),
    "type.jsonl": (b'{"text": null}\n', "type.jsonl line 1 has NoneType in field 'text'"),
    "surrogate.jsonl": (b'{"text": "a\\ud800b"}\n', r"surrogate.jsonl line 1 has a lone surrogate '\\ud800'"),
    "not.jsonl.gz": (b"plain", "not.jsonl.gz cannot be decompressed"),
    "cut.jsonl.gz": (gzip.compress(LONG)[:-20], "cut.jsonl.gz cannot be decompressed"),
    "damaged.jsonl.gz": (
        gzip.compress(LONG)[:30] + b"\x00" * 9 + gzip.compress(LONG)[39:],
        "damaged.jsonl.gz cannot be decompressed",
    ),
    "not.jsonl.zst": (b"plain text", "not.jsonl.zst cannot be decompressed"),
    "cut.jsonl.zst": (zstandard.compress(LONG)[:-5], "cut.jsonl.zst cannot be decompressed .the last frame"),
    "not.parquet": (b"plain", "not.parquet cannot be read as parquet"),
    "cut.parquet": (parquet_bytes(pa.table({"text": ["x" * 99]}))[:-30], "cut.parquet cannot be read as parquet"),
    "column.parquet": (parquet_bytes(pa.table({"body": ["x"]})), "column.parquet has no column 'text'; its columns are 'body'"),
    "null.parquet": (parquet_bytes(pa.table({"text": ["x", None]})), "null.parquet row 2 has NoneType in field 'text'"),
    "type.parquet": (parquet_bytes(pa.table({"text": [1]})), "type.parquet row 1 has int in field 'text'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_documents(str(tmp_path / name)))


def test_lines_before_the_bad_one_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first"}\nnot json\n')
    documents = read_documents(str(tmp_path / "a.jsonl"))
    assert next(documents).text == "first"
    with pytest.raises(UserError, match="line 2"):
        next(documents)
