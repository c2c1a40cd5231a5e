"""Digests of input files, and the memo of those of large ones."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from retro_jax.corpus import digests
from retro_jax.corpus.digests import digest_file
from retro_jax.corpus.sources import source_fingerprint
from retro_jax.errors import UserError


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_digest_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in (b"one", b"three"):
        path.write_bytes(data)
        assert digest_file(path) == digest_file(path, tmp_path / "memo.json") == sha(data)
    assert not (tmp_path / "memo.json").exists()


def test_large_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MEMO_FROM_BYTES", 4)
    read: list[str] = []
    monkeypatch.setattr(digests, "_digest", lambda path, *state: read.append(path.name) or sha(path.read_bytes()))
    memo = tmp_path / "data/digests.json"
    (tmp_path / "a.txt").write_bytes(b"large")
    (tmp_path / "b.txt").write_bytes(b"larger")
    (tmp_path / "c.txt").write_bytes(b"odd")
    first = source_fingerprint(str(tmp_path), memo)
    assert read == ["a.txt", "b.txt", "c.txt"]
    assert source_fingerprint(str(tmp_path), memo) == first
    assert read == ["a.txt", "b.txt", "c.txt", "c.txt"]
    os.utime(tmp_path / "b.txt", ns=(1, 1))
    assert source_fingerprint(str(tmp_path), memo) == first
    assert read[4:] == ["b.txt", "c.txt"]
    memo.write_text("{damaged")
    assert source_fingerprint(str(tmp_path), memo) == first
    assert read[6:] == ["a.txt", "b.txt", "c.txt"]


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none \(No such file or directory\); check the file"):
        digest_file(tmp_path / "none")
