"""Tokenizers: nothing lost, bytes counted, unknown text refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from retro_jax.config import TokenizerConfig
from retro_jax.corpus.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, load_sentencepiece
from retro_jax.errors import UserError
from tests.corpus.conftest import SENTENCES

Load = Callable[..., Tokenizer]
# Sentencepiece takes U+2581 for a space, as its format has it.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)
CASES = [
    "",
    " ",
    "  two  ",
    "\n\ttab",
    "é\u0301 \U0001f600\U0001f468\u200d\U0001f469",
    "<s></s><|endoftext|><|bos|>",
    "\x00\ufeff\u2028",
    "a" * 300,
]


def byte_level(**options: object) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {
        "vocab_size": 400,
        "special_tokens": ["<s>", "</s>"],
        "initial_alphabet": sorted(alphabet),
        "show_progress": False,
    } | options
    model.train_from_iterator(SENTENCES, trainers.BpeTrainer(**options))
    return model


def llama_json() -> tokenizers.Tokenizer:
    """The form that Llama 2's converter writes: Prepend, Replace, byte fallback."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "t",
        "h",
        "e",
        "é",
        "\u2581t",
        "th",
        "\u2581th",
    ]
    model = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("\u2581", "t"), ("t", "h"), ("\u2581t", "h")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    return model


def with_words() -> tokenizers.Tokenizer:
    """Byte-level, with added tokens that are text (GPT-NeoX's runs of spaces), and truncation and padding set."""
    model = byte_level()
    model.add_tokens(["    ", "né"])
    model.enable_truncation(5)
    model.enable_padding(length=50)
    return model


@pytest.fixture(scope="module")
def lossless(llama_like: Path) -> dict[str, Tokenizer]:
    return {
        "byte-level": JsonTokenizer(byte_level(), 0, 1),
        "added words": JsonTokenizer(with_words(), 0, 1),
        "sentencepiece": SentencePieceTokenizer(load_sentencepiece(llama_like), 1, 2),
        "llama json": JsonTokenizer(llama_json(), 1, 2),
    }


LOSSLESS = ["byte-level", "added words", "sentencepiece", "llama json"]
PREFIX = {"sentencepiece": 1, "llama json": 1}


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, max_size=5))
def test_nothing_is_lost_and_bytes_add_up(lossless: dict[str, Tokenizer], name: str, texts: list[str]) -> None:
    tokenizer = lossless[name]
    assert tokenizer.prefix_bytes == PREFIX.get(name, 0)
    texts = texts + CASES
    rows = tokenizer.encode_batch(texts)
    assert all(row.dtype == np.int32 for row in rows)
    assert tokenizer.decode_batch(rows) == texts
    counts = tokenizer.token_bytes()
    assert counts.dtype == np.int32
    assert counts.shape == (tokenizer.vocab_size,)
    for text, row in zip(texts, rows, strict=True):
        prefix = tokenizer.prefix_bytes if text else 0  # nothing is put before nothing
        if name == "llama json" and not text:
            assert len(row) == 0
        assert counts[row].sum() == len(text.encode()) + prefix


@pytest.mark.parametrize("name", LOSSLESS)
def test_special_tokens_are_only_ever_added(lossless: dict[str, Tokenizer], name: str) -> None:
    tokenizer = lossless[name]
    assert tokenizer.bos_id is not None
    special = {tokenizer.bos_id, tokenizer.eod_id}
    (row,) = tokenizer.encode_batch(["<s>the</s> <s> </s>"])
    assert not special & set(row.tolist())
    assert tokenizer.decode_batch([np.array([tokenizer.bos_id, *row, tokenizer.eod_id])]) == ["<s>the</s> <s> </s>"]
    assert tokenizer.token_bytes()[sorted(special)].tolist() == [0, 0]


def test_each_token_of_bytes(lossless: dict[str, Tokenizer]) -> None:
    model = byte_level()
    counts = lossless["byte-level"].token_bytes()
    assert counts[model.token_to_id("Ġthe")] == 4
    assert counts[model.token_to_id("Ã")] == 1
    counts = lossless["llama json"].token_bytes()
    pieces = llama_json()
    expected = {"<0x41>": 1, "\u2581th": 3, "é": 2, "\u2581": 1, "<unk>": 0}
    assert {piece: counts[pieces.token_to_id(piece)] for piece in expected} == expected


def test_a_chunk_that_cuts_a_letter_decodes(lossless: dict[str, Tokenizer]) -> None:
    (row,) = lossless["byte-level"].encode_batch(["xé"])
    assert lossless["byte-level"].decode_batch([row[:2], row[2:], row[:0]]) == ["x\ufffd", "\ufffd", ""]
    assert lossless["sentencepiece"].decode_batch([]) == []


def test_ids_are_the_librarys(shared: Path, load: Load) -> None:
    gpt2 = load(TokenizerConfig(kind="gpt2", path=str(shared / "data/tok_gpt2")))
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eod_id) == (50257, None, 50256)
    # The published encoding of this sentence.
    assert gpt2.encode_batch(["Hello world, it's 2024!"])[0].tolist() == [15496, 995, 11, 340, 338, 48609, 0]
    assert gpt2.token_bytes()[50256] == 0
    mistral = load(TokenizerConfig(kind="sentencepiece", path=str(shared / "data/tok_mistral_v1/tokenizer.model")))
    assert (mistral.vocab_size, mistral.bos_id, mistral.eod_id) == (32000, 1, 2)
    assert mistral.encode_batch(["Hello world"])[0].tolist() == [22557, 1526]
    assert mistral.prefix_bytes == 1
    assert gpt2.prefix_bytes == 0


def test_real_text_and_real_tokenizers(shared: Path, load: Load) -> None:
    text = (shared / "data/corpus_tinyshakespeare/input.txt").read_text()[:20_000] + "naïve 北京 🤖\n"
    for config in (
        TokenizerConfig(kind="gpt2", path=str(shared / "data/tok_gpt2")),
        TokenizerConfig(kind="sentencepiece", path=str(shared / "data/tok_mistral_v1")),
        TokenizerConfig(kind="sentencepiece", path=str(shared / "data/tok_bpe_32k_c4/bpe_32k_c4.model")),
    ):
        tokenizer = load(config)
        (row,) = tokenizer.encode_batch([text])
        assert tokenizer.token_bytes()[row].sum() == len(text.encode()) + tokenizer.prefix_bytes
        assert tokenizer.decode_batch([row]) == [text]


UNKNOWN = r"the tokenizer has no token for '{piece}' in {place}; take a byte-level tokenizer"


def test_unknown_sentencepiece_text_is_refused(train_sentencepiece: Callable[..., Path]) -> None:
    path = train_sentencepiece(model_type="unigram", vocab_size=60)
    tokenizer = SentencePieceTokenizer(load_sentencepiece(path), 1, 2)
    with pytest.raises(UserError, match=UNKNOWN.format(piece="北京", place="b.txt")):
        tokenizer.encode_batch(["the chunk", "the 北京 chunk"], ["a.txt", "b.txt"])


@pytest.mark.parametrize("unk", ["<unk>", None])
def test_unknown_bytes_are_refused_not_dropped(unk: str | None) -> None:
    """A byte-level BPE trained without its whole alphabet drops bytes in silence if it has no unknown token."""
    special = ["<s>", "</s>"] + ([unk] if unk else [])
    model = byte_level(initial_alphabet=[], special_tokens=special)
    if unk:
        model.model.unk_token = unk
    tokenizer = JsonTokenizer(model, 0, 1)
    assert tokenizer.decode_batch(tokenizer.encode_batch(["the chunk"])) == ["the chunk"]
    with pytest.raises(UserError, match=r"has no token for '.*ß.*' in text 1|has no token for 'ß' in text 1"):
        tokenizer.encode_batch(["the chunk", "the groß chunk"])


def test_unknown_unigram_json_is_refused() -> None:
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -2.0) for piece in ["\u2581", "a", "b", "\u2581a"])]
    model = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    tokenizer = JsonTokenizer(model, None, 1)
    assert tokenizer.token_bytes().tolist() == [0, 0, 1, 1, 1, 2]
    assert tokenizer.prefix_bytes == 1
    with pytest.raises(UserError, match=UNKNOWN.format(piece="c", place="text 0")):
        tokenizer.encode_batch(["a bca"])


def test_a_vocabulary_without_latin_letters() -> None:
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), ("\u0434", -2.0)]
    model = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    assert JsonTokenizer(model, None, 1).prefix_bytes == 1


def test_dropout_is_turned_off() -> None:
    model = byte_level()
    model.model.dropout = 0.9
    tokenizer = JsonTokenizer(model, 0, 1)
    assert len({tuple(tokenizer.encode_batch([SENTENCES[0]])[0].tolist()) for _ in range(10)}) == 1


def test_word_pieces_are_refused() -> None:
    model = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="is a WordPiece that is neither byte-level nor of sentencepiece's kind"):
        JsonTokenizer(model, None, 0)


def test_files_that_are_no_tokenizers(tmp_path: Path, load: Load) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    (tmp_path / "vocab.json").write_text(json.dumps(["a"]))
    (tmp_path / "merges.txt").write_text("a b\n")
    for kind, message in {
        "tokenizer_json": "tokenizer.json is not a tokenizer.json that tokenizers",
        "sentencepiece": "tokenizer.model is not a sentencepiece model",
        "gpt2": r"vocab.json and .*merges.txt are not a BPE vocabulary and its merges",
    }.items():
        with pytest.raises(UserError, match=message):
            load(TokenizerConfig(kind=kind, path=str(tmp_path)))
