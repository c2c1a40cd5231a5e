"""The data stages in order, and the command that runs them."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

from retro_jax.cli import STORED_JSON, STORED_TEXT, Run, main
from retro_jax.corpus.chunk_table import ChunkTable
from retro_jax.data.training_rows import training_rows
from retro_jax.dry_run import describe_run
from retro_jax.errors import UserError
from retro_jax.gin_config import load_config
from retro_jax.prepare import MADE_FROM, STAGES, built_stages, prepare

SETTINGS = """
CorpusConfig.sources = ('{corpus}',)
CorpusConfig.valid_fraction = 0.1
CorpusConfig.test_fraction = 0.1
CorpusConfig.workers = 1
TokenizerConfig.vocab_size = 384
ChunkConfig.chunk_len = 8
ChunkConfig.retrieved_len = 16
RetrievalConfig.workers = 1
RetrievalConfig.features = 4096
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A gin file over 80 documents of words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    corpus = tmp_path / "corpus.jsonl"
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(80)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = tmp_path / "small.gin"
    path.write_text(SETTINGS.format(corpus=corpus))
    return path


def command(config_file: Path, *extra: str) -> int:
    return main(["prepare", "--config", str(config_file), "--workdir", str(config_file.parent / "run"), *extra])


def stage_words(output: str) -> dict[str, str]:
    """What each stage's line says: built, skipped, removed, verified."""
    return dict(re.findall(rf"^({'|'.join(STAGES)}) +(\w+)", output, re.MULTILINE))


def test_every_stage_is_built_once(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(config_file) == 0
    output = capsys.readouterr().out
    assert stage_words(output) == dict.fromkeys(STAGES, "built")
    assert "python train.py --config" in output
    run = config_file.parent / "run"
    assert load_config([run / STORED_TEXT]) == load_config([config_file])
    assert json.loads((run / STORED_JSON).read_text())["chunks"]["chunk_len"] == 8
    manifests = {stage: (run / "data" / stage / "manifest.json").read_bytes() for stage in STAGES}
    assert command(config_file) == 0
    assert stage_words(capsys.readouterr().out) == dict.fromkeys(STAGES, "skipped")
    assert manifests == {stage: (run / "data" / stage / "manifest.json").read_bytes() for stage in STAGES}


def test_what_is_made_from_what_is_as_the_manifests_say(config_file: Path) -> None:
    assert command(config_file) == 0
    data = config_file.parent / "run" / "data"
    manifests = {stage: json.loads((data / stage / "manifest.json").read_text()) for stage in STAGES}
    names = {manifest["fingerprint"]: stage for stage, manifest in manifests.items()}
    ancestors: dict[str, set[str]] = {}
    for stage, inputs in MADE_FROM.items():
        ancestors[stage] = set(inputs).union(*(ancestors[name] for name in inputs))
        if stage not in STAGES:
            continue
        recorded = {names[value] for value in manifests[stage]["inputs"].values() if value in names}
        assert set(inputs) & set(STAGES) <= recorded <= ancestors[stage]


def test_counts_and_tables_agree(config_file: Path) -> None:
    lines: list[str] = []
    data_dir = config_file.parent / "data"
    prepared = prepare(load_config([config_file]), data_dir, lines.append)
    counts = [prepared.tables[split].num_chunks for split in ("train", "valid", "test")]
    documents = [prepared.tables[split].num_documents for split in ("train", "valid", "test")]
    assert sum(documents) == 80
    chunk_line = next(line for line in lines if line.startswith("chunks"))
    assert f"chunks {counts[0]:,} / {counts[1]:,} / {counts[2]:,}" in chunk_line
    assert f"documents {documents[0]} / {documents[1]} / {documents[2]}" in chunk_line
    assert [prepared.neighbours[split].ids_NS.shape for split in ("train", "valid", "test")] == [(n, 20) for n in counts]
    assert prepared.neighbours["test"].ids_NS.max() < counts[0]


def test_rebuild_makes_the_stage_and_what_follows_anew(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(config_file) == 0
    data = config_file.parent / "run" / "data"
    before = {stage: (data / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES}
    capsys.readouterr()
    assert command(config_file, "--rebuild", "vectors") == 0
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines() if line.endswith("removed")] == ["vectors", "index", "neighbours"]
    after = {stage: (data / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES}
    assert {stage for stage in STAGES if before[stage] != after[stage]} == {"vectors", "index", "neighbours"}
    assert command(config_file, "--rebuild", "ngrams") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("removed")] == ["ngrams"]
    assert command(config_file, "--rebuild", "vector") == 2
    assert "choose one of tokenizer, tokens, chunks" in capsys.readouterr().err
    assert built_stages(data) == dict.fromkeys(STAGES, "built")


def test_other_settings_are_refused_until_rebuilt(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(config_file) == 0
    stored = (config_file.parent / "run" / STORED_TEXT).read_text()
    changed = ["--set", "ChunkConfig.chunk_len=4"]
    capsys.readouterr()
    assert command(config_file, *changed) == 2
    captured = capsys.readouterr()
    assert "chunk_len=8, now chunk_len=4 is asked for" in captured.err
    assert "--rebuild chunks" in captured.err
    assert captured.err.count("\n") == 1
    assert (config_file.parent / "run" / STORED_TEXT).read_text() == stored
    assert command(config_file, *changed, "--rebuild", "chunks") == 0
    output = capsys.readouterr().out
    assert "ChunkConfig.chunk_len was 8 in the last run" in output
    assert stage_words(output)["tokens"] == "skipped"
    assert (config_file.parent / "run" / STORED_TEXT).read_text() != stored


def test_verify_finds_one_changed_byte(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(config_file, "--verify") == 2
    assert "holds no artefact to verify" in capsys.readouterr().err
    assert command(config_file) == 0
    capsys.readouterr()
    assert command(config_file, "--verify") == 0
    assert stage_words(capsys.readouterr().out) == dict.fromkeys(STAGES, "verified")
    ids = config_file.parent / "run" / "data" / "neighbours" / "train.ids.npy"
    content = bytearray(ids.read_bytes())
    content[-1] ^= 1
    ids.write_bytes(content)
    assert command(config_file, "--verify") == 2
    error = capsys.readouterr().err
    assert str(ids) in error
    assert "corrupted" in error
    assert "--rebuild neighbours" in error


def test_data_dir_is_shared_between_workdirs(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = config_file.parent / "shared"
    arguments = ["prepare", "--config", str(config_file), "--set", f"Config.data_dir={shared}", "--workdir"]
    assert main([*arguments, str(config_file.parent / "a")]) == 0
    capsys.readouterr()
    assert main([*arguments, str(config_file.parent / "b")]) == 0
    assert stage_words(capsys.readouterr().out) == dict.fromkeys(STAGES, "skipped")
    assert not (config_file.parent / "b" / "data").exists()


JOINED = ["--set", "DataConfig.seq_len=32", "--set", "DataConfig.batch_size=4", "--set", "TrainConfig.steps=10"]


def test_joined_rows_are_made_on_request(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = config_file.parent / "run" / "data"
    assert command(config_file, *JOINED) == 0
    assert "joined" not in built_stages(data)
    capsys.readouterr()
    assert command(config_file, "--join", *JOINED) == 0
    output, told = capsys.readouterr()
    assert re.search(r"^joined +built .* bytes [\d,]+, rows 40, rows_per_shard [\d,]+, shards 1$", output, re.MULTILINE)
    assert "40 joined training rows of" in told and "are free in" in told
    assert f"{' '.join(JOINED)} --set DataConfig.rows=joined" in output
    assert command(config_file, "--join", *JOINED) == 0
    assert re.search(r"^joined +skipped", capsys.readouterr().out, re.MULTILINE)
    assert command(config_file, "--verify") == 0
    assert re.search(r"^joined +verified +1 files", capsys.readouterr().out, re.MULTILINE)
    assert command(config_file, *JOINED) == 0
    assert not re.search(r"^joined", capsys.readouterr().out, re.MULTILINE)
    assert command(config_file, "--rebuild", "neighbours", *JOINED) == 0
    assert re.search(r"^joined +removed", capsys.readouterr().out, re.MULTILINE)
    assert "joined" not in built_stages(data)
    assert command(config_file, "--join-epochs", "2", *JOINED) == 0
    rows = len(training_rows(ChunkTable(data, "train"), 32, weights=None))
    assert f", rows {2 * rows}, " in capsys.readouterr().out
    assert command(config_file, "--rebuild", "joined", *JOINED) == 0
    assert ", rows 40, " in capsys.readouterr().out
    assert command(config_file, "--join-epochs", "0") == 2
    assert capsys.readouterr().err == "error: --join-epochs 0 must be at least 1\n"


def test_what_is_not_joined_is_told_to_processes_that_cannot_do_it(config_file: Path) -> None:
    data = config_file.parent / "data"
    config = load_config([config_file], [word for word in JOINED if word != "--set"])
    joined = dataclasses.replace(config, data=dataclasses.replace(config.data, rows="joined"))
    assert "\njoined: 40 training rows of " in describe_run(Run(joined, config_file.parent))
    assert prepare(config, data, lambda line: None).joined is None
    with pytest.raises(UserError, match="has no joined, and several processes do not build data together"):
        prepare(joined, data, lambda line: None, build=False)
    assert prepare(joined, data, lambda line: None, build=False, join=False).joined is None
    assert len(prepare(joined, data, lambda line: None).joined or ()) == 40
    assert len(prepare(joined, data, lambda line: None, build=False).joined or ()) == 40
    described = describe_run(Run(joined, config_file.parent))
    assert "joined built" in described and "joined: 40" not in described
