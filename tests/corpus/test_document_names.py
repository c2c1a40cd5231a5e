"""Ids and titles of documents: what was written is read, by number and by id, over sources and splits."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from retro_jax.artefact import build_artefact
from retro_jax.config import SPLITS, CorpusConfig, TokenizerConfig
from retro_jax.corpus import document_names
from retro_jax.corpus.document_names import DocumentName, DocumentNames, DocumentNamesWriter, encode_names
from retro_jax.corpus.token_stage import build_tokens, store_prefix
from retro_jax.corpus.tokenizer import load_tokenizer
from retro_jax.corpus.tokenizer_stage import build_tokenizer

NAMES = st.lists(st.builds(DocumentName, st.text(max_size=5), st.text(max_size=8)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=3), st.integers(1, 5))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, sources: list[list[list[DocumentName]]], at_once: int
) -> None:
    """Sources of several blocks each; names of any text, also none."""
    folder = tmp_path_factory.mktemp("names")

    def make(partial: Path) -> dict:
        for number, blocks in enumerate(sources):
            with DocumentNamesWriter(store_prefix(partial, number, "train")) as writer:
                for block in blocks:
                    writer.add(*encode_names(block))
        return {"sources": [{"splits": {"train": {"documents": sum(map(len, blocks))}}} for blocks in sources]}

    build_artefact(folder / "tokens", kind="tokens", settings={}, inputs={}, make=make)
    every = [name for blocks in sources for block in blocks for name in block]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_names, "READ_AT_ONCE", at_once)
        names = DocumentNames(folder / "tokens", "train")
        wanted = {name.id for name in every[::2]} | {"not there"}
        found = names.find(wanted)
    assert len(names) == len(every)
    assert names.read(np.arange(len(every))[::-1]) == every[::-1]
    expected = {one: [number for number, name in enumerate(every) if name.id == one] for one in wanted}
    assert found == {one: numbers for one, numbers in expected.items() if numbers}


def build(tmp_path: Path, **changes: object) -> Path:
    """Two sources: one whose documents have names, with a blank one among them, and one without."""
    named = [{"id": f"p{i}", "title": f"Title {i}", "text": f"text {i} about ducks and \u00e9"} for i in range(40)]
    named[3]["text"] = "  "
    named[5]["id"], named[6]["title"] = 17, None  # type: ignore[assignment]
    named[7]["title"] = "\ud800 half"
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(one) + "\n" for one in named))
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": f"other text {i}"}) + "\n" for i in range(10)))
    sources = (str(tmp_path / "plain.jsonl"), str(tmp_path / "named.jsonl"))
    config = CorpusConfig(sources=sources, valid_fraction=0.2, test_fraction=0.2, workers=1, **changes)  # type: ignore[arg-type]
    data = tmp_path / "data"
    data.mkdir()
    build_tokenizer(TokenizerConfig(vocab_size=320), config, data)
    build_tokens(config, data)
    return data


def test_names_of_a_corpus_stand_by_their_documents(tmp_path: Path) -> None:
    data = build(tmp_path, block_documents=7)
    tokenizer = load_tokenizer(data / "tokenizer")
    seen = []
    for split in SPLITS:
        names = DocumentNames(data / "tokens", split)
        texts = [text for source in range(2) for text in documents(data, source, split, tokenizer)]
        assert len(names) == len(texts) > 3
        for text, name in zip(texts, names.read(np.arange(len(names))), strict=True):
            number = text.split()[1]
            if text.startswith("other"):
                assert name == DocumentName("", "")
                continue
            title = {"6": "", "7": "? half"}.get(number, f"Title {number}")
            assert name == DocumentName("17" if number == "5" else f"p{number}", title)
            seen.append(name.id)
    assert sorted(seen) == sorted(["17", *(f"p{i}" for i in range(40) if i not in (3, 5))])


def documents(data: Path, source: int, split: str, tokenizer: object) -> list[str]:
    from retro_jax.corpus.token_store import TokenStore

    store = TokenStore(store_prefix(data / "tokens", source, split))
    return tokenizer.decode_batch([store.document(number) for number in range(len(store))])  # type: ignore[attr-defined]


def test_tokens_without_names_have_none(tmp_path: Path) -> None:
    """As those that were built before names were kept."""
    data = build(tmp_path)
    manifest = json.loads((data / "tokens" / "manifest.json").read_text())
    for file in [name for name in manifest["files"] if ".name" in name]:
        (data / "tokens" / file).unlink()
        del manifest["files"][file]
    del manifest["digest"]  # nor had manifests then one of themselves
    (data / "tokens" / "manifest.json").write_text(json.dumps(manifest))
    names = DocumentNames(data / "tokens", "train")
    assert set(names.read(np.arange(len(names)))) == {DocumentName("", "")}
    assert names.find({"p1"}) == {}
