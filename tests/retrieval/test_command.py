"""``python -m retro_jax retrieval query`` as a person uses it, on a few documents."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from retro_jax.cli import main
from retro_jax.gin_config import load_config
from retro_jax.prepare import prepare_database

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SETTINGS = """
CorpusConfig.sources = ('{corpus}',)
CorpusConfig.valid_fraction = 0.0
CorpusConfig.test_fraction = 0.0
CorpusConfig.workers = 1
TokenizerConfig.vocab_size = 400
ChunkConfig.chunk_len = 8
ChunkConfig.retrieved_len = 16
DataConfig.seq_len = 64
EvalConfig.window = 64
EvalConfig.stride = 32
ModelConfig.retro = None
RetrievalConfig.features = 4096
RetrievalConfig.workers = 1
"""
DUCK = "the duck swims on the lake near the old mill and sleeps in the reeds all night"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without neighbours, and its config as a run stores it."""
    folder = tmp_path_factory.mktemp("asked")
    documents = [{"id": "d0", "title": "Ducks", "text": DUCK}]
    documents += [{"id": f"d{i}", "title": "", "text": f"other words number {i:02d} stand here " * 4} for i in range(1, 12)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "config.gin").write_text(SETTINGS.format(corpus=folder / "corpus.jsonl"))
    prepare_database(load_config([folder / "config.gin"]), folder / "data", lambda line: None)
    return folder


def query(workdir: Path, *arguments: str) -> int:
    return main(["retrieval", "query", "--workdir", str(workdir), *arguments])


def test_the_chunk_its_document_and_how_it_goes_on(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert query(workdir, "--json", "--k", "2", "a duck swims", "words number 07") == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["text"], second["text"]) == ("a duck swims", "words number 07")
    best = first["neighbours"][0]
    assert (best["rank"], best["id"], best["title"], best["source"]) == (1, "d0", "Ducks", str(workdir / "corpus.jsonl"))
    assert DUCK.startswith(best["text"] + best["continuation"]) and "duck" in best["text"] and best["continuation"]
    distances = [answer["distance"] for answer in second["neighbours"]]
    assert second["neighbours"][0]["id"] == "d7" and len(distances) == 2 and 0 < distances[0] <= distances[1] < 1


def test_what_a_person_sees(workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of standard input, one a line; a text of which nothing stands in the database is told so."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("duck lake [bold]\n\nzebra\n"))
    assert query(workdir, "--k", "1", "-") == 0
    output = capsys.readouterr().out
    assert "duck lake [bold]" in output and "zebra" in output
    lines = [line.strip() for line in output.splitlines()]
    where = next(i for i, line in enumerate(lines) if line.startswith("1 "))
    assert "document 0 · d0 · Ducks" in lines[where]
    assert lines[where + 1].startswith("chunk ") and lines[where + 2].startswith("goes on ")
    assert output.count("nothing: the embedder finds nothing") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--k", "0", "duck"), "--k 0 must be at least 1"),
        (("duck", " "), "a text to search for is empty"),
        (("--set", "ChunkConfig.chunk_length=3", "duck"), "ChunkConfig has no field chunk_length"),
    ],
)
def test_what_is_refused(workdir: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert query(workdir, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_config_or_a_database(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert query(tmp_path, "duck") == 2
    assert "config.gin is not there; give the --config" in capsys.readouterr().err
    assert query(tmp_path, "--config", str(workdir / "config.gin"), "duck") == 2
    assert "is not there or not finished; run `python -m retro_jax prepare`" in capsys.readouterr().err
    assert main(["retrieval", "query", "duck"]) == 2
    assert "neither --workdir nor --config" in capsys.readouterr().err


def test_a_search_needs_no_jax(workdir: Path) -> None:
    program = (
        "import sys; from retro_jax.cli import main\n"
        f"code = main(['retrieval', 'query', '--workdir', {str(workdir)!r}, '--json', 'duck'])\n"
        "sys.exit(code or 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["neighbours"][0]["id"] == "d0", done.stderr
