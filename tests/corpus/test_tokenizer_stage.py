"""The tokenizer stage: trained on training documents alone and the same each time; special tokens found; mistakes told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from retro_jax.config import CorpusConfig, TokenizerConfig
from retro_jax.corpus.split import split_of_text
from retro_jax.corpus.tokenizer import load_tokenizer
from retro_jax.corpus.tokenizer_stage import build_tokenizer, training_texts
from retro_jax.errors import UserError
from tests.corpus.conftest import SENTENCES

SMALL = TokenizerConfig(vocab_size=400)


def test_trained(corpus: Path, tmp_path: Path) -> None:
    artefact = build_tokenizer(SMALL, CorpusConfig(sources=(str(corpus),)), tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id, tokenizer.prefix_bytes) == (400, 0, 1, 0)
    (row,) = tokenizer.encode_batch(["the neighbour \x00\xff北"])
    assert tokenizer.decode_batch([row]) == ["the neighbour \x00\xff北"]
    assert len(row) < len("the neighbour") + 6
    train = [text for text in SENTENCES if split_of_text(text, "", CorpusConfig()) == "train"]
    assert artefact.summary["train_documents"] == len(train) < 400
    assert artefact.summary["train_bytes"] == sum(map(len, train))
    assert artefact.summary["vocab_size"] == 400
    again = build_tokenizer(SMALL, CorpusConfig(sources=(str(corpus),)), tmp_path / "data")
    assert again.fingerprint == artefact.fingerprint


def test_held_out_documents_leave_no_trace(tmp_path: Path) -> None:
    """With other held-out texts the tokenizer is the same byte for byte."""
    files = []
    for word in ("zyzzyva", "quixotry"):
        held_out = [text for i in range(3000) if split_of_text(text := f"{word} {word} {i}", "", CorpusConfig()) != "train"]
        assert len(held_out) > 100
        path = tmp_path / f"{word}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*held_out, *SENTENCES]))
        build_tokenizer(SMALL, CorpusConfig(sources=(str(path),)), tmp_path / word)
        files.append((tmp_path / word / "tokenizer/tokenizer.json").read_bytes())
    assert files[0] == files[1]


def test_threads_and_hash_seeds_do_not_matter(corpus: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from retro_jax.config import *;"
        "from retro_jax.corpus.tokenizer_stage import build_tokenizer;"
        "build_tokenizer(TokenizerConfig(vocab_size=600), CorpusConfig(sources=(sys.argv[1],)), Path(sys.argv[2]))"
    )
    files = []
    for threads in ("1", "4"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        run = [sys.executable, "-c", code, str(corpus), str(tmp_path / threads)]
        subprocess.run(run, check=True, cwd=Path(__file__).parents[2], env=environment)
        files.append((tmp_path / threads / "tokenizer/tokenizer.json").read_bytes())
    assert files[0] == files[1]


def test_training_bytes_are_shared_between_sources(tmp_path: Path) -> None:
    for name, text, count in (("a", "aaaaaaaaaa", 100), ("b", "bbbbb", 100), ("c", "cc", 3)):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}\n' * count)
    config = CorpusConfig(sources=tuple(str(tmp_path / f"{n}.jsonl") for n in "abc"), valid_fraction=0.0, test_fraction=0.0)
    texts = list(training_texts(config, 217))
    assert sum(size for _, size in texts) == 217
    assert [len(text) for text, _ in texts] == [size for _, size in texts]
    taken = {letter: sum(size for text, size in texts if text[0] == letter) for letter in "abc"}
    assert taken["c"] == 6
    assert abs(taken["a"] - taken["b"]) <= 10
    assert sum(size for _, size in training_texts(config, 10**9)) == 1506


def test_a_cut_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("xé")
    config = CorpusConfig(sources=(str(tmp_path / "a.txt"),), valid_fraction=0.0, test_fraction=0.0)
    assert list(training_texts(config, 2)) == [("x", 2)]


def test_max_documents(corpus: Path, tmp_path: Path) -> None:
    config = CorpusConfig(sources=(str(corpus),), max_documents=7, valid_fraction=0.0, test_fraction=0.0)
    assert [text for text, _ in training_texts(config, 10**9)] == SENTENCES[:7]


@pytest.mark.parametrize(
    ("sources", "config", "message"),
    [
        (["{}/corpus.jsonl", "megatron:{}/store"], {}, "'megatron:.*' holds tokens of another tokenizer, so none can be trained"),
        (["{}/corpus.jsonl"], {"valid_fraction": 0.5, "test_fraction": 0.4999999}, "have no text in the training split"),
        (["{}/empty.jsonl"], {}, "have no text in the training split to train a tokenizer on"),
        (["{}/bad.jsonl"], {}, "bad.jsonl line 2 is not JSON"),
        (["{}/missing.jsonl"], {}, "is neither a known source nor an existing file"),
    ],
)
def test_corpora_that_cannot_be_trained_on(corpus: Path, tmp_path: Path, sources: list[str], config: dict, message: str) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    named = tuple(source.format(tmp_path) for source in sources)
    with pytest.raises(UserError, match=message):
        build_tokenizer(SMALL, CorpusConfig(sources=named, **config), tmp_path / "data")
    assert not list((tmp_path / "data").glob("*")) if (tmp_path / "data").exists() else True


def save_json(folder: Path, special: list[str], words: list[str] = []) -> Path:  # noqa: B006
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(SENTENCES, trainer)
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("special", "beside", "config", "expected"),
    [
        (["<|endoftext|>"], None, {}, (None, "<|endoftext|>")),
        (["<s>", "</s>"], None, {}, ("<s>", "</s>")),
        (["<s>", "</s>"], None, {"bos": ""}, (None, "</s>")),
        (["<s>", "</s>", "<end>"], None, {"eod": "<end>"}, ("<s>", "<end>")),
        (["<go>", "<end>"], {"bos_token": {"content": "<go>"}, "eos_token": "<end>"}, {}, ("<go>", "<end>")),
        (["<s>", "</s>", "<end>"], {"bos_token": None, "eos_token": "<end>"}, {}, ("<s>", "<end>")),
        (["<|endoftext|>"], {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, {}, (None, "<|endoftext|>")),
    ],
)
def test_special_tokens(tmp_path: Path, special: list[str], beside: dict | None, config: dict, expected: tuple) -> None:
    folder = save_json(tmp_path / "given", special)
    if beside is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    build_tokenizer(TokenizerConfig(kind="tokenizer_json", path=str(folder), **config), CorpusConfig(), tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer")
    ids = {name: i for i, name in enumerate(special)}
    assert (tokenizer.bos_id, tokenizer.eod_id) == (ids.get(expected[0]), ids[expected[1]])


def test_special_tokens_that_cannot_be_found(tmp_path: Path) -> None:
    folder = save_json(tmp_path / "given", ["<go>", "[END]"])
    config = {"kind": "tokenizer_json", "path": str(folder)}
    with pytest.raises(
        UserError, match=r"which token ends a document; set TokenizerConfig.eod: .* special are '<go>', '\[END\]'"
    ):
        build_tokenizer(TokenizerConfig(**config), CorpusConfig(), tmp_path / "data")
    with pytest.raises(UserError, match=r"TokenizerConfig.bos='<s>' is not in the tokenizer's vocabulary of 300; .*'<go>'"):
        build_tokenizer(TokenizerConfig(**config, eod="[END]", bos="<s>"), CorpusConfig(), tmp_path / "data")


def test_another_file_is_refused(tmp_path: Path) -> None:
    config = TokenizerConfig(kind="tokenizer_json", path=str(save_json(tmp_path / "given", ["<s>", "</s>"])))
    first = build_tokenizer(config, CorpusConfig(), tmp_path / "data")
    (tmp_path / "given").rename(tmp_path / "moved")
    moved = TokenizerConfig(kind="tokenizer_json", path=str(tmp_path / "moved/tokenizer.json"))
    assert build_tokenizer(moved, CorpusConfig(), tmp_path / "data").fingerprint == first.fingerprint
    save_json(tmp_path / "moved", ["<s>", "</s>", "<pad>"])
    with pytest.raises(UserError, match="was built with input tokenizer.json="):
        build_tokenizer(moved, CorpusConfig(), tmp_path / "data")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "tokenizer_json", "path": "{}/none.json"}, "none.json' is no existing file; give the path of tokenizer.json"),
        (
            {"kind": "sentencepiece", "path": "{}"},
            "has no tokenizer.model or spiece.model, which TokenizerConfig.kind='sentencepiece'",
        ),
        ({"kind": "gpt2", "path": "{}"}, "has no merges.txt or vocab.bpe"),
        ({"kind": "gpt2", "path": "{}", "merges": "{}/m"}, "TokenizerConfig.merges='.*/m' is no existing file"),
    ],
)
def test_missing_files(tmp_path: Path, config: dict, message: str) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        build_tokenizer(TokenizerConfig(**{k: v.format(tmp_path) for k, v in config.items()}), CorpusConfig(), tmp_path / "data")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_under_both_names(tmp_path: Path, names: tuple[str, str]) -> None:
    json_folder = save_json(tmp_path / "given", ["<|endoftext|>"])
    spec = json.loads((json_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / names[0]).write_text(json.dumps(spec["vocab"]))
    merges = "".join(" ".join(pair) + "\n" for pair in spec["merges"])
    (tmp_path / "gpt2" / names[1]).write_text("#version: 0.2\n" + merges)
    build_tokenizer(TokenizerConfig(kind="gpt2", path=str(tmp_path / "gpt2")), CorpusConfig(), tmp_path / "a")
    build_tokenizer(TokenizerConfig(kind="tokenizer_json", path=str(json_folder)), CorpusConfig(), tmp_path / "b")
    gpt2, other = load_tokenizer(tmp_path / "a/tokenizer"), load_tokenizer(tmp_path / "b/tokenizer")
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eod_id) == (other.vocab_size, None, 0)
    for mine, theirs in zip(gpt2.encode_batch(SENTENCES[:20]), other.encode_batch(SENTENCES[:20]), strict=True):
        assert mine.tolist() == theirs.tolist()
    assert gpt2.token_bytes().tolist() == other.token_bytes().tolist()


def test_sentencepiece_tells_its_special_tokens(
    tmp_path: Path, llama_like: Path, train_sentencepiece: Callable[..., Path]
) -> None:
    build_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(llama_like)), CorpusConfig(), tmp_path / "data")
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer")
    assert (tokenizer.bos_id, tokenizer.eod_id) == (1, 2)
    without = train_sentencepiece(eos_id=-1, bos_id=-1, user_defined_symbols=["<end>"])
    with pytest.raises(UserError, match=r"which token ends a document; .* special are '<end>', '<unk>'"):
        build_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(without)), CorpusConfig(), tmp_path / "other")
    config = TokenizerConfig(kind="sentencepiece", path=str(without), eod="<end>")
    build_tokenizer(config, CorpusConfig(), tmp_path / "other")
    named = load_tokenizer(tmp_path / "other/tokenizer")
    assert (named.bos_id, named.token_bytes()[named.eod_id]) == (None, 0)
