"""The tokens stage: what is stored, killed and continued runs, bounded memory, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from retro_jax.config import SPLITS, CorpusConfig, TokenizerConfig
from retro_jax.corpus.split import split_of, split_of_text
from retro_jax.corpus.token_stage import build_tokens, store_prefix
from retro_jax.corpus.token_store import TokenStore, TokenStoreWriter
from retro_jax.corpus.tokenizer import load_tokenizer
from retro_jax.corpus.tokenizer_stage import build_tokenizer
from retro_jax.errors import UserError
from tests.corpus.conftest import SENTENCES

REPOSITORY = Path(__file__).parents[2]
SPLIT = {"valid_fraction": 0.1, "test_fraction": 0.2, "workers": 1}


def prepared(corpus: CorpusConfig, data: Path, vocab_size: int = 400) -> Path:
    build_tokenizer(TokenizerConfig(vocab_size=vocab_size), corpus, data)
    build_tokens(corpus, data)
    return data / "tokens"


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def stored_texts(data: Path, source: int, split: str) -> list[str]:
    tokenizer = load_tokenizer(data / "tokenizer")
    store = TokenStore(store_prefix(data / "tokens", source, split))
    documents = [store.document(i) for i in range(len(store))]
    assert all(document[0] == tokenizer.bos_id and document[-1] == tokenizer.eod_id for document in documents)
    assert not any((document[1:-1] == tokenizer.eod_id).any() for document in documents)
    return tokenizer.decode_batch(documents)


def test_every_document_is_stored_once_in_its_split(tmp_path: Path) -> None:
    texts = [*SENTENCES, " \n", "", SENTENCES[3], "é\U0001f600\n\x00", SENTENCES[3]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b").mkdir()
    for i in range(30):
        (tmp_path / f"b/{i:02d}.txt").write_text(f"book {i} " * 50)
    config = CorpusConfig(sources=(str(tmp_path / "a.jsonl"), str(tmp_path / "b")), block_documents=37, **SPLIT)
    prepared(config, tmp_path / "data")
    books = [f"book {i} " * 50 for i in range(30)]
    for source, wanted in enumerate([[text for text in texts if text.strip()], books]):
        for split in SPLITS:
            expected = [text for text in wanted if split_of_text(text, "", config) == split]
            assert stored_texts(tmp_path / "data", source, split) == expected
            assert expected
    summary = json.loads((tmp_path / "data/tokens/manifest.json").read_text())["summary"]["sources"]
    assert [entry["documents"] for entry in summary] == [len(texts), 30]
    assert [entry["empty"] for entry in summary] == [2, 0]
    for entry, wanted in zip(summary, [texts, books], strict=True):
        total = sum(len(text.encode()) for text in wanted if text.strip())
        assert entry["text_bytes"] == entry["token_bytes"] == total
    for i, entry in enumerate(summary):
        for split in SPLITS:
            store = TokenStore(store_prefix(tmp_path / "data/tokens", i, split))
            assert entry["splits"][split] == {"documents": len(store), "tokens": len(store.tokens)}


def test_split_by_group_keeps_a_file_together(tmp_path: Path) -> None:
    for i in range(40):
        lines = "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for text in SENTENCES[:5])
        (tmp_path / f"{i:02d}.jsonl").write_text(lines)
    config = CorpusConfig(sources=(f"{tmp_path}/*.jsonl",), split_by="group", **SPLIT)
    prepared(config, tmp_path / "data")
    files = {split: {text.split()[-1] for text in stored_texts(tmp_path / "data", 0, split)} for split in SPLITS}
    assert all(files.values())
    assert sum(map(len, files.values())) == 40
    assert files["valid"] == {str(i) for i in range(40) if split_of(f"{i:02d}.jsonl".encode(), config) == "valid"}


def test_max_documents_of_each_source(corpus: Path, tmp_path: Path) -> None:
    config = CorpusConfig(sources=(str(corpus), str(corpus)), max_documents=50, block_documents=7, **SPLIT)
    prepared(config, tmp_path / "data")
    for source in range(2):
        assert sum(len(stored_texts(tmp_path / "data", source, split)) for split in SPLITS) == 50


def test_blocks_and_workers_do_not_matter(corpus: Path, tmp_path: Path) -> None:
    found = []
    for i, (block, workers) in enumerate([(2048, 1), (13, 1), (29, 2)]):
        config = CorpusConfig(sources=(str(corpus),), block_documents=block, **SPLIT | {"workers": workers})
        found.append(bytes_of(prepared(config, tmp_path / f"data{i}")))
    assert found[0] == found[1] == found[2]
    assert sorted(found[0]) == sorted(
        [f"0-{split}.{end}" for split in SPLITS for end in ("bin", "idx", "names", "name_ends")] + ["manifest.json"]
    )


def test_long_documents_end_a_block_early(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CorpusConfig(sources=(str(corpus),), **SPLIT)
    whole = bytes_of(prepared(config, tmp_path / "a"))
    sizes: list[int] = []
    monkeypatch.setattr("retro_jax.corpus.token_stage.BLOCK_BYTES", 500)
    encode = load_tokenizer(tmp_path / "a/tokenizer").__class__.encode_batch
    monkeypatch.setattr(
        "retro_jax.corpus.tokenizer.JsonTokenizer.encode_batch",
        lambda self, texts, where=None: sizes.append(sum(map(len, texts))) or encode(self, texts, where),
    )
    assert bytes_of(prepared(config, tmp_path / "b")) == whole
    assert len(sizes) > 40
    assert max(sizes) < 500 + max(map(len, SENTENCES))


RUN = """
import sys, time
from pathlib import Path
from retro_jax.config import CorpusConfig
from retro_jax.corpus import token_stage

if __name__ == "__main__":
    source, data, workers, pause, block = sys.argv[1:]
    tasks = token_stage._tasks
    def slowly(*arguments):
        for number, task in enumerate(tasks(*arguments)):
            time.sleep(float(pause) if number > 8 else 0)
            yield task
    token_stage._tasks = slowly
    config = CorpusConfig(
        sources=(source,), block_documents=int(block), workers=int(workers), valid_fraction=0.1, test_fraction=0.2
    )
    token_stage.build_tokens(config, Path(data))
"""


def command(script: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(script), *map(str, arguments)]


def killed(run: list[str], blocks: Path, wanted: int) -> None:
    """Start the command, and SIGKILL it when so many blocks are stored."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(run, env=environment) as process:
        deadline = time.monotonic() + 60
        while len(list(blocks.glob("*.done"))) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_killed_and_continued_gives_the_same_bytes(corpus: Path, tmp_path: Path, first: int, then: int) -> None:
    config = CorpusConfig(sources=(str(corpus),), block_documents=20, **SPLIT)
    whole = bytes_of(prepared(config, tmp_path / "whole"))
    data = tmp_path / "data"
    build_tokenizer(TokenizerConfig(vocab_size=400), config, data)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    blocks = data / "tokens.partial/blocks"
    killed(command(script, corpus, data, first, 0.2, 20), blocks, 5)
    assert not (data / "tokens").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in blocks.glob("*.done")}
    assert 5 <= len(kept) < 20
    killed(command(script, corpus, data, then, 0.2, 20), blocks, len(kept) + 2)
    assert {name: (blocks / name).stat().st_mtime_ns for name in kept} == kept
    run = command(script, corpus, data, then, 0, 20)
    subprocess.run(run, check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert bytes_of(data / "tokens") == whole


def test_blocks_of_another_size_are_not_mixed_in(corpus: Path, tmp_path: Path) -> None:
    config = CorpusConfig(sources=(str(corpus),), block_documents=20, **SPLIT)
    whole = bytes_of(prepared(config, tmp_path / "whole"))
    data = tmp_path / "data"
    build_tokenizer(TokenizerConfig(vocab_size=400), config, data)
    (tmp_path / "run.py").write_text(RUN)
    killed(command(tmp_path / "run.py", corpus, data, 1, 0.2, 33), data / "tokens.partial/blocks", 3)
    build_tokens(config, data)
    assert bytes_of(data / "tokens") == whole


MEMORY = """
import sys
from pathlib import Path
from retro_jax.config import CorpusConfig, TokenizerConfig
from retro_jax.corpus.token_stage import build_tokens
from retro_jax.corpus.tokenizer_stage import build_tokenizer

config = CorpusConfig(sources=(sys.argv[1],), block_documents=100, workers=1)
build_tokenizer(TokenizerConfig(vocab_size=400, train_bytes=100_000), config, Path(sys.argv[2]))
build_tokens(config, Path(sys.argv[2]))
# (Of getrusage's maximum a new process inherits its parent's.)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for copies in (6, 24):
        path = tmp_path / f"{copies}.jsonl"
        path.write_text("".join(json.dumps({"text": text * 20}) + "\n" for text in SENTENCES) * copies)
        run = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / f"data{copies}")]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TOKENIZERS_PARALLELISM": "false"}
        peaks.append(int(subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout))
    # Measured: 0.3 MB more for 10 MB more of text.
    assert path.stat().st_size / 1024 > 13_000
    assert peaks[1] - peaks[0] < 2_500


def megatron(folder: Path, documents: list[list[int]], name: str = "store", dtype: type = np.uint16) -> str:
    with TokenStoreWriter(folder / name, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.array(document, dtype), np.array([len(document)]))
    return f"megatron:{folder / name}"


@pytest.fixture
def with_llama(tmp_path: Path, llama_like: Path) -> Path:
    config = TokenizerConfig(kind="sentencepiece", path=str(llama_like))
    build_tokenizer(config, CorpusConfig(), tmp_path / "data")
    return tmp_path / "data"


def test_megatron_stores_load_as_they_are(tmp_path: Path, with_llama: Path) -> None:
    generator = np.random.default_rng(0)
    documents = [generator.integers(3, 400, generator.integers(1, 30)).tolist() for _ in range(200)]
    documents = [document + [2] * (i % 2) for i, document in enumerate(documents)]  # EOD after every other one
    documents += [[2], documents[0], documents[0]]
    found = []
    for dtype in (np.uint16, np.int64):
        name = np.dtype(dtype).name
        data = tmp_path / name
        (data / "tokenizer").parent.mkdir()
        (data / "tokenizer").symlink_to(with_llama / "tokenizer")
        config = CorpusConfig(sources=(megatron(tmp_path, documents, name, dtype),), block_documents=17, **SPLIT)
        artefact = build_tokens(config, data)
        for split in SPLITS:
            store = TokenStore(store_prefix(data / "tokens", 0, split))
            expected = [d for d in documents if d != [2] and split_of(np.array(d, "<i4").tobytes(), config) == split]
            assert [store.document(i).tolist() for i in range(len(store))] == expected
            assert expected
        assert (artefact.summary["sources"][0]["documents"], artefact.summary["sources"][0]["empty"]) == (203, 1)
        found.append({name: digest for name, digest in bytes_of(data / "tokens").items() if name != "manifest.json"})
    assert found[0] == found[1]


def test_megatron_max_documents(tmp_path: Path, with_llama: Path) -> None:
    source = megatron(tmp_path, [[i + 3] for i in range(100)])
    config = CorpusConfig(sources=(source,), block_documents=17, max_documents=40, **SPLIT)
    build_tokens(config, with_llama)
    stores = [TokenStore(store_prefix(with_llama / "tokens", 0, split)) for split in SPLITS]
    assert sorted(token for store in stores for token in store.tokens.tolist()) == list(range(3, 43))


def test_another_vocabulary_is_refused(tmp_path: Path, with_llama: Path) -> None:
    vocab_size = load_tokenizer(with_llama / "tokenizer").vocab_size
    config = CorpusConfig(sources=(megatron(tmp_path, [[3], [4, vocab_size]]),), **SPLIT)
    with pytest.raises(UserError, match=f"store holds token id {vocab_size}, but the tokenizer has {vocab_size} ids"):
        build_tokens(config, with_llama)
    assert sorted(path.name for path in with_llama.iterdir()) == ["tokenizer"]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_leaves_nothing_and_can_be_mended(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in SENTENCES]
    path.write_text("\n".join(lines))
    config = CorpusConfig(sources=(str(path),), block_documents=20, **SPLIT | {"workers": workers, "max_documents": 390})
    build_tokenizer(TokenizerConfig(vocab_size=400), config, tmp_path / "data")
    path.write_text("\n".join([*lines[:380], '{"txt": 1}', *lines[381:]]))
    with pytest.raises(UserError, match=r"a\.jsonl line 381 has no field 'text' .* its fields are 'txt'"):
        build_tokens(config, tmp_path / "data")
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["tokenizer"]
    path.write_text("\n".join(lines))
    assert build_tokens(config, tmp_path / "data").summary["sources"][0]["documents"] == 390


@pytest.mark.parametrize("workers", [1, 2])
def test_unknown_text_names_the_document(corpus: Path, tmp_path: Path, train_sentencepiece: object, workers: int) -> None:
    model = train_sentencepiece(model_type="unigram", vocab_size=60)  # type: ignore[operator]
    build_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(model)), CorpusConfig(), tmp_path / "data")
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "the 北 chunk"}) + "\n")
    config = CorpusConfig(sources=(str(corpus),), **SPLIT | {"workers": workers})
    with pytest.raises(UserError, match=r"no token for '北' in .*corpus\.jsonl line 401; take a byte-level"):
        build_tokens(config, tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "fractions", "message"),
    [
        ('{"text": " "}\n\n{"text": ""}\n', {}, r"has no text \(2 empty documents\)"),
        ("", {}, r"has no text \(0 empty documents\)"),
        ('{"text": "one"}\n', {"valid_fraction": 0.5, "test_fraction": 0.499999}, "no document falls into the training split"),
    ],
)
def test_empty_corpora(corpus: Path, tmp_path: Path, content: str, fractions: dict, message: str) -> None:
    build_tokenizer(TokenizerConfig(vocab_size=400), CorpusConfig(sources=(str(corpus),)), tmp_path / "data")
    (tmp_path / "few.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        build_tokens(CorpusConfig(sources=(str(tmp_path / "few.jsonl"),), **SPLIT | fractions), tmp_path / "data")
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["tokenizer"]


def test_changed_sources_are_refused(corpus: Path, tmp_path: Path) -> None:
    config = CorpusConfig(sources=(str(corpus),), **SPLIT)
    prepared(config, tmp_path / "data")
    with corpus.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"tokens was built with input source 0='corpus\.jsonl:.*--rebuild tokens"):
        build_tokens(config, tmp_path / "data")
