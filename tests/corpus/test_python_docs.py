"""The documentation of the running Python, read without importing it."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from retro_jax.corpus import python_docs
from retro_jax.corpus.document import Document
from retro_jax.corpus.python_docs import LEFT_OUT, python_docs_fingerprint, python_documents
from retro_jax.errors import UserError

SAMPLE = '''"""About the module."""
import not_there_at_all
LATE = not_there_at_all.fail()

def plain(a, b=1, *, c): "What plain does."

def without(a): pass

async def waits(x: int) -> str:
    r"""What waits does.

    List:
        Kept indentation \\d.
    """

class Base(Exception, metaclass=type):
    """A class."""

    def method(self): """Method."""

    class Inner:
        """Inner class."""
        def deep(self): """What plain does."""

class Silent:
    def method(self): pass
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of this Python's library, and three topics, two of them with one text."""
    monkeypatch.setattr("retro_jax.corpus.python_docs._library", lambda: tmp_path)
    monkeypatch.setattr(
        "retro_jax.corpus.python_docs._topic_texts", lambda: {"b": "Topic B.\n\n", "a": "Topic A.", "c": "Topic A."}
    )
    # Without the cache, which holds the documents of the real library.
    monkeypatch.setattr("retro_jax.corpus.python_docs.python_documents", python_documents.__wrapped__)
    return tmp_path


def fake_documents() -> tuple[Document, ...]:
    return python_docs.python_documents()


def test_documents_of_a_module(library: Path) -> None:
    for name in ("pack/__init__.py", "test/no.py", "pack/tests/no.py", "site-packages/no.py", "pack/broken.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text('"""Not wanted."""' if "broken" not in name else '"""Broken."""\nprint "2"')
    (library / "pack/__init__.py").write_text(SAMPLE)
    documents = {(document.group, document.title): document.text for document in fake_documents()}
    assert documents == {
        ("topics/a", "a"): "Topic A.\n",
        ("topics/b", "b"): "Topic B.\n",
        ("pack", "pack"): (
            "pack\n\nAbout the module.\n\ndef plain(a, b=1, *, c)\n    What plain does.\n\n"
            "async def waits(x: int)\n    What waits does.\n\n    List:\n        Kept indentation \\d.\n"
        ),
        ("pack", "pack.Base"): (
            "pack.Base\n\nclass Base(Exception)\n    A class.\n\n"
            "def Base.method(self)\n    Method.\n\nclass Base.Inner\n    Inner class.\n"
        ),
    }


def test_fingerprint_follows_the_files(library: Path) -> None:
    (library / "m.py").write_text('"""One."""')
    first = python_docs_fingerprint()
    assert first.startswith("python-docs-3.")
    (library / "m.py").write_text('"""Two."""')
    assert python_docs_fingerprint() != first


def test_a_python_without_its_library_is_told(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_jax.corpus.python_docs._topic_texts", dict)
    with pytest.raises(UserError, match=r"found no \.py files"):
        fake_documents()


def test_this_pythons_documentation() -> None:
    documents = python_documents()
    texts = [document.text for document in documents]
    assert len(set(texts)) == len(texts) > 1000
    assert sum(len(text.encode()) for text in texts) > 1_500_000
    by_title = {document.title: document for document in documents}
    library = Path(sysconfig.get_path("stdlib"))
    docstring = ast.get_docstring(ast.parse((library / "bisect.py").read_text()))
    assert docstring is not None
    assert docstring in by_title["bisect"].text
    assert "def insort_right(a, x, lo=0, hi=None, *, key=None)" in by_title["bisect"].text
    assert by_title["json.decoder.JSONDecoder"].group == "json.decoder"
    assert not {part for document in documents for part in document.group.split(".")} & (LEFT_OUT - {"topics"})


def test_nothing_is_imported() -> None:
    code = (
        "import sys; from retro_jax.corpus.sources import read_documents; before = set(sys.modules);"
        "n = sum(1 for _ in read_documents('python-docs')); print(n, sorted(set(sys.modules) - before))"
    )
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    count, modules = result.stdout.split(maxsplit=1)
    assert int(count) == len(python_documents())
    # Codecs of old files, and what tells where the library is.
    allowed = ("pydoc_data", "encodings.", "_sysconfigdata")
    assert [name for name in ast.literal_eval(modules) if not name.startswith(allowed)] == []
