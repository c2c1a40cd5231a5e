"""The source ``python-docs``: the documentation of the running Python, read without importing what it documents.

A document is one of ``pydoc``'s topics, a module's own docstring with those of its functions, or a class's docstring with
those of its members. Definitions without a docstring are left out, and so are texts seen before, and tests.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from retro_jax.corpus.document import Document
from retro_jax.errors import UserError

# Counted up when the documents made from the same files change: it is part of the fingerprint.
EXTRACTION = 1
LEFT_OUT = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
)

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@functools.cache
def python_documents() -> tuple[Document, ...]:
    """All documents, in the order of topics' names and modules' paths. ``group`` is the topic or the module.

    Raises:
        UserError: this Python is installed without its documentation or its library's source files.
    """
    seen: set[str] = set()
    documents = tuple(_topics(seen)) + tuple(_docstrings(seen))
    if not documents:
        raise UserError(
            f"source 'python-docs' found no .py files in {_library()}; install Python with its library's sources, or name files"
        )
    return documents


def python_docs_fingerprint() -> str:
    """Digest of the files that the documents are read from, with the Python version."""
    digest = hashlib.sha256(f"{EXTRACTION}".encode())
    for path in _modules():
        digest.update(f"{path.relative_to(_library())}\0".encode() + path.read_bytes() + b"\0")
    for name, text in sorted(_topic_texts().items()):
        digest.update(f"{name}\0{text}\0".encode())
    return f"python-docs-{platform.python_version()}:{digest.hexdigest()[:16]}"


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules() -> list[Path]:
    root = _library()
    return sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))


def _topic_texts() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "source 'python-docs' needs pydoc_data, which this Python lacks; install it, or name other sources"
        ) from None
    return topics


def _topics(seen: set[str]) -> Iterator[Document]:
    for name, text in sorted(_topic_texts().items()):
        if text not in seen:  # some topics have two names
            seen.add(text)
            yield Document(text=text.strip() + "\n", group=f"topics/{name}", title=name, where=f"python-docs topic {name}")


def _docstrings(seen: set[str]) -> Iterator[Document]:
    for path in _modules():
        relative = path.relative_to(_library())
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in old files
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:
                continue  # templates and files of other versions that some distributions ship
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        parts = [_new_docstring(tree, seen), *(part for node in functions for part in _definitions(node, "", seen))]
        yield from _document(module, module, parts)
        for node in classes:
            yield from _document(module, f"{module}.{node.name}", list(_definitions(node, "", seen)))


def _document(module: str, title: str, parts: list[str]) -> Iterator[Document]:
    parts = [part for part in parts if part]
    if parts:
        text = f"{title}\n\n" + "\n\n".join(parts) + "\n"
        yield Document(text=text, group=module, title=title, where=f"python-docs {title}")


def _definitions(node: _Definition, outer: str, seen: set[str]) -> Iterator[str]:
    """One text for each definition with a new docstring: its signature, then the docstring, indented."""
    name = outer + node.name
    docstring = _new_docstring(node, seen)
    if docstring:
        indented = "\n".join("    " + line if line else "" for line in docstring.splitlines())
        yield f"{_signature(node, name)}\n{indented}"
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, _Definition):
                yield from _definitions(member, name + ".", seen)


def _signature(node: _Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}def {name}({ast.unparse(node.args)})"


def _new_docstring(node: _Definition | ast.Module, seen: set[str]) -> str:
    docstring = (ast.get_docstring(node) or "").strip()
    if docstring in seen:
        return ""
    seen.add(docstring)
    return docstring
