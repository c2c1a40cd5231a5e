"""Token stores against bytes laid out by hand, in both directions."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.corpus.token_store import TokenStore, TokenStoreWriter, digest_store, token_dtype
from retro_jax.errors import UserError


def laid_out(
    code: int, dtype: str, sequences: list[list[int]], document_index: list[int], tail: bytes = b""
) -> tuple[bytes, bytes]:
    """A store as Megatron's ``_IndexWriter`` writes it, with ``struct`` alone."""
    width = struct.calcsize("<" + dtype)
    binary = b"".join(struct.pack("<" + dtype, token) for sequence in sequences for token in sequence)
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(document_index))
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    offsets = [width * sum(len(sequence) for sequence in sequences[:i]) for i in range(len(sequences))]
    index += b"".join(struct.pack("<q", offset) for offset in offsets)
    index += b"".join(struct.pack("<q", entry) for entry in document_index)
    return binary, index + tail


def placed(folder: Path, files: tuple[bytes, bytes]) -> Path:
    prefix = folder / "store"
    prefix.with_suffix(".bin").write_bytes(files[0])
    prefix.with_suffix(".idx").write_bytes(files[1])
    return prefix


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> None:
    with TokenStoreWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.array(document, np.int32).astype(dtype), np.array([len(document)]))


@pytest.mark.parametrize(("code", "letter", "dtype"), [(8, "H", np.uint16), (4, "i", np.int32)])
def test_written_bytes_are_megatrons(tmp_path: Path, code: int, letter: str, dtype: type) -> None:
    documents = [[5, 6, 7], [65499], [1, 2]]
    write(tmp_path / "store", documents, dtype)
    binary, index = laid_out(code, letter, documents, [0, 1, 2, 3])
    assert (tmp_path / "store.bin").read_bytes() == binary
    assert (tmp_path / "store.idx").read_bytes() == index
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store.bin", "store.idx"]


@pytest.mark.parametrize(
    ("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")], ids=["u8", "i8", "i16", "i32", "i64", "u16"]
)
def test_documents_of_several_sequences_are_joined(tmp_path: Path, code: int, letter: str) -> None:
    sequences = [[1, 2], [3], [4, 5, 6], [], [7]]
    prefix = placed(tmp_path, laid_out(code, letter, sequences, [0, 2, 3, 3, 5]))
    store = TokenStore(prefix)
    assert len(store) == 4
    assert [store.document(i).tolist() for i in range(4)] == [[1, 2, 3], [4, 5, 6], [], [7]]
    tokens, lengths = store.documents(1, 4)
    assert tokens.tolist() == [4, 5, 6, 7]
    assert lengths.tolist() == [3, 0, 1]
    assert store.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert store.starts(0, 2).tolist() == [0, 3]


def test_sequences_may_lie_in_any_order(tmp_path: Path) -> None:
    binary, index = laid_out(8, "H", [[1, 2], [3]], [0, 1, 2])
    header = len(b"MMIDIDX\x00\x00") + 8 + 1 + 8 + 8
    swapped = index[: header + 8] + struct.pack("<qq", 2, 0) + index[header + 24 :]
    store = TokenStore(placed(tmp_path, (binary, swapped)))
    assert store.documents(0, 2)[0].tolist() == [2, 3, 1]


def test_multimodal_stores_end_with_modes(tmp_path: Path) -> None:
    prefix = placed(tmp_path, laid_out(8, "H", [[1], [2]], [0, 1, 2], tail=b"\x00\x01"))
    assert TokenStore(prefix).document(1).tolist() == [2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), max_size=12), st.data())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], data: st.DataObject
) -> None:
    prefix = tmp_path_factory.mktemp("store") / "store"
    write(prefix, documents)
    store = TokenStore(prefix)
    assert [store.document(i).tolist() for i in range(len(store))] == documents
    first = data.draw(st.integers(0, len(documents)))
    last = data.draw(st.integers(first, len(documents)))
    tokens, lengths = store.documents(first, last)
    assert tokens.tolist() == [token for document in documents[first:last] for token in document]
    assert lengths.tolist() == store.lengths(first, last).tolist() == [len(document) for document in documents[first:last]]


def test_dtype_is_megatrons_choice() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_an_exception_leaves_no_index(tmp_path: Path) -> None:
    write(tmp_path / "store", [[1]])
    with pytest.raises(KeyError), TokenStoreWriter(tmp_path / "store", np.dtype(np.uint16)):
        raise KeyError
    assert not (tmp_path / "store.idx").exists()
    with pytest.raises(UserError, match=r"store\.idx is not there"):
        TokenStore(tmp_path / "store")


def test_writer_refuses_lengths_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lengths sum to 3"), TokenStoreWriter(tmp_path / "store", np.dtype(np.int32)) as writer:
        writer.add(np.arange(2, dtype=np.int32), np.array([3]))


GOOD = laid_out(8, "H", [[1, 2, 3], [4, 5]], [0, 1, 2])
SIZES_AT = 34


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((GOOD[0][:-1], GOOD[1]), r"store\.bin has 9 bytes, but its index reaches byte 10"),
        ((GOOD[0], GOOD[1][:-1]), r"store\.idx has 81 bytes instead of 82"),
        ((GOOD[0], GOOD[1][:20]), r"store\.idx is not the index"),
        ((GOOD[0], b"TNTIDX\x00\x00" + GOOD[1][8:]), r"store\.idx is not the index"),
        ((GOOD[0], replaced(GOOD[1], 9, b"\x02")), "version 2 and dtype code 8"),
        ((GOOD[0], replaced(GOOD[1], 17, b"\x06")), "version 1 and dtype code 6"),
        ((GOOD[0], replaced(GOOD[1], SIZES_AT, struct.pack("<i", -1))), "negative length"),
        ((GOOD[0], replaced(GOOD[1], SIZES_AT + 8, struct.pack("<q", 1))), "impossible places"),
        ((GOOD[0], replaced(GOOD[1], SIZES_AT + 24, struct.pack("<q", 1))), "does not rise from 0"),
        ((GOOD[0], replaced(GOOD[1], SIZES_AT + 32, struct.pack("<q", 3))), "does not rise from 0"),
        ((GOOD[0], replaced(GOOD[1], SIZES_AT + 40, struct.pack("<q", 1))), "does not rise from 0 to its 2"),
    ],
)
def test_damage_is_told(tmp_path: Path, files: tuple[bytes, bytes], message: str) -> None:
    prefix = placed(tmp_path, files)
    with pytest.raises(UserError, match=message):
        TokenStore(prefix)


def test_digest_depends_on_both_files(tmp_path: Path) -> None:
    prefix = placed(tmp_path, GOOD)
    first = digest_store(prefix)
    placed(tmp_path, (replaced(GOOD[0], 0, b"\x07\x00\x01"), GOOD[1]))
    assert digest_store(prefix) != first
    with pytest.raises(UserError, match=r"other\.bin is not there"):
        digest_store(tmp_path / "other")
