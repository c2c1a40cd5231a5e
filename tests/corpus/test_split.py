"""Splits follow from the document alone, in the asked shares."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from retro_jax.config import CorpusConfig
from retro_jax.corpus.split import split_of, split_of_text

KEYS = [f"document {i}".encode() for i in range(20_000)]


def test_shares() -> None:
    counts = Counter(split_of(key, CorpusConfig(valid_fraction=0.1, test_fraction=0.2)) for key in KEYS)
    # Standard deviations are 42 and 57 documents.
    assert abs(counts["valid"] - 2000) < 200
    assert abs(counts["test"] - 4000) < 250


def test_a_known_document_never_moves() -> None:
    # blake2b of eight bytes: 0xe4a6a0577479b2b4 (RFC 7693 with an empty input), .8932 of the range.
    assert split_of(b"", CorpusConfig(valid_fraction=0.11, test_fraction=0.0)) == "valid"
    assert split_of(b"", CorpusConfig(valid_fraction=0.10, test_fraction=0.89)) == "train"
    assert split_of(b"", CorpusConfig(valid_fraction=0.10, test_fraction=0.895)) == "test"


def test_a_larger_split_keeps_what_it_had_and_leaves_the_other() -> None:
    small, large = CorpusConfig(valid_fraction=0.1, test_fraction=0.1), CorpusConfig(valid_fraction=0.3, test_fraction=0.1)
    for key in KEYS[:2000]:
        before, after = split_of(key, small), split_of(key, large)
        assert after == before or (before, after) == ("train", "valid")


def test_fractions_of_zero_are_empty() -> None:
    config = CorpusConfig(valid_fraction=0.0, test_fraction=0.0)
    assert {split_of(key, config) for key in KEYS} == {"train"}


@given(st.text(), st.text(), st.text())
def test_split_by_text_or_by_group(text: str, other: str, group: str) -> None:
    by_text, by_group = (CorpusConfig(split_by=key, valid_fraction=0.3, test_fraction=0.3) for key in ("text", "group"))
    assert split_of_text(text, group, by_text) == split_of_text(text, other, by_text) == split_of(text.encode(), by_text)
    assert split_of_text(text, group, by_group) == split_of_text(other, group, by_group) == split_of(group.encode(), by_group)
