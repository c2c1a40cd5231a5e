"""Which files a source names, in what order, and when its fingerprint changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from retro_jax.corpus.sources import read_documents, source_fingerprint
from retro_jax.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {
        "b/2.txt": "b2",
        "a.txt": "a",
        "b/1.jsonl": '{"text": "b1"}',
        "b/.hid/3.txt": "no",
        "notes.md": "no",
    }.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "corpus"


def groups_and_texts(source: str) -> list[tuple[str, str]]:
    return [(document.group, document.text) for document in read_documents(source)]


def test_folder_is_read_in_order_of_names(folder: Path) -> None:
    assert groups_and_texts(str(folder)) == [("a.txt", "a"), ("b/1.jsonl", "b1"), ("b/2.txt", "b2")]


def test_globs(folder: Path) -> None:
    assert groups_and_texts(f"{folder}/**/*.txt") == [("a.txt", "a"), ("b/2.txt", "b2")]
    assert groups_and_texts(f"{folder}/b/*") == [("1.jsonl", "b1"), ("2.txt", "b2")]


def test_a_name_with_brackets_is_a_file_if_it_exists(folder: Path) -> None:
    (folder / "c[1].txt").write_text("bracket")
    assert groups_and_texts(f"{folder}/c[1].txt") == [("c[1].txt", "bracket")]


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert groups_and_texts("~/a.txt") == [("a.txt", "a")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikipedia", "'wikipedia' is neither a known source nor .* allowed are python-docs, files .*tfds:<dataset>"),
        ("FOLDER/nothing.txt", "nothing.txt' is neither a known source nor an existing file"),
        ("FOLDER/notes.md", r"notes.md' ends in none of \.txt"),
        ("FOLDER/*.parquet", r"\*\.parquet' matches no file"),
        ("FOLDER/*.md", r"matches 1 paths, none a file that ends in one of \.txt"),
        ("FOLDER/empty", "is a folder without files that end in"),
        ("megatron:FOLDER/none", "none.bin is not there"),
    ],
)
def test_what_is_not_there_is_told(folder: Path, source: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        source_fingerprint(source.replace("FOLDER", str(folder)))


def test_tokens_are_no_documents(folder: Path) -> None:
    with pytest.raises(UserError, match="holds tokens, not text"):
        next(read_documents(f"megatron:{folder}/store"))


def test_fingerprint_follows_content_and_names(folder: Path) -> None:
    first = source_fingerprint(str(folder))
    assert first.startswith("corpus:")
    (folder / "notes.md").write_text("not a part of it")
    assert source_fingerprint(str(folder)) == first
    moved = folder.rename(folder.parent / "elsewhere")
    assert source_fingerprint(str(moved)).split(":")[1] == first.split(":")[1]
    (moved / "a.txt").write_text("A")
    changed = source_fingerprint(str(moved))
    (moved / "a.txt").rename(moved / "z.txt")
    assert len({first.split(":")[1], changed.split(":")[1], source_fingerprint(str(moved)).split(":")[1]}) == 3
