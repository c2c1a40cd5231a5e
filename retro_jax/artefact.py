"""Folders of data with a manifest: built once, resumed when killed, refused when their inputs changed.

An artefact is a folder with ``manifest.json``: kind, format version, the settings that made it, the fingerprints of its
inputs, a summary (counts), size and SHA-256 of every file, and a digest of all this. It is built beside its place, in
``<name>.partial``, and renamed when whole, so that a folder with a manifest is always complete.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from retro_jax.errors import BadInput, UserError
from retro_jax.sole_writer import LOCK, sole_writer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
BLOCKS = "blocks"
# What the manifests of 0.1.0 say, which have no digest of themselves.
UNDIGESTED = {"kind", "format_version", "settings", "inputs", "summary", "files", "fingerprint"}
# Blocks that are no longer needed, under this name while they are deleted: a kill must not leave some of them to be taken up.
DROPPED = "dropped"
# Larger files are checked by size alone when an artefact is opened, and by checksum on request.
CHECKSUM_ON_OPEN_BYTES = 256 * 2**20
Checksums = Literal["none", "small", "all"]


@dataclass(frozen=True)
class Artefact:
    """A complete artefact on disk."""

    path: Path
    manifest: Mapping

    @property
    def fingerprint(self) -> str:
        """What other artefacts record when they are built from this one."""
        return self.manifest["fingerprint"]

    @property
    def settings(self) -> Mapping:
        """The settings that made it."""
        return self.manifest["settings"]

    @property
    def summary(self) -> Mapping:
        """Counts and facts that the stage recorded."""
        return self.manifest["summary"]

    def array(self, name: str) -> np.ndarray:
        """The array stored as ``<name>.npy``, memory-mapped and read-only."""
        return np.load(self.path / f"{name}.npy", mmap_mode="r")


def build_artefact(
    path: Path,
    *,
    kind: str,
    settings: Mapping,
    inputs: Mapping[str, str],
    make: Callable[[Path], Mapping],
    checksums: Checksums = "small",
) -> Artefact:
    """Open the artefact at ``path``, or build it.

    Args:
        path: its folder.
        kind: what it is ("tokens", "neighbours"); the name of its stage.
        settings: JSON values that decide its content.
        inputs: fingerprints of what it is made from.
        make: called with a folder that may hold blocks of an earlier, killed run; writes the artefact's files there and
            returns the summary. Files in its ``blocks`` subfolder are dropped when it returns.
        checksums: how it is checked where it stands; see :func:`open_artefact`.

    Raises:
        UserError: it stands there with other settings or inputs, another process builds it, or the disk is full.
    """
    path = Path(path)
    plan = {"kind": kind, "format_version": FORMAT_VERSION, "settings": _plain(settings), "inputs": dict(inputs)}
    if (path / MANIFEST).exists():
        artefact = open_artefact(path, kind, checksums=checksums)
        _refuse_other(path, plan, artefact.manifest)
        return artefact
    partial = path.with_name(path.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with sole_writer(partial), _disk_full_told(path):
        _sweep(partial)
        if found := _plan_of(partial):
            _refuse_other(path, plan, found)
        else:
            write_text(partial / PLAN, json.dumps(plan, indent=2, sort_keys=True))
        try:
            summary = make(partial)
        except BadInput:
            shutil.rmtree(partial)
            raise
        manifest = {**plan, "summary": _plain(summary), "files": _file_facts(partial)}
        manifest["fingerprint"] = _digest_json(_without(manifest, "summary"))
        if (partial / BLOCKS).exists():
            (partial / BLOCKS).rename(partial / DROPPED)
            shutil.rmtree(partial / DROPPED)
        (partial / PLAN).unlink()
        (partial / LOCK).unlink()
        manifest["digest"] = _digest_json(manifest)
        write_text(partial / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        partial.rename(path)
    return Artefact(path, manifest)


def open_artefact(path: Path, kind: str, *, checksums: Checksums = "small") -> Artefact:
    """Open a complete artefact after checking its kind, version, file sizes and checksums ("none": sizes alone, "small": of files
    up to 256 MiB, "all": of every file).

    Raises:
        UserError: it is missing, of another kind or version, truncated or corrupted.
    """
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder that holds it, {path.parent}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there or not finished; run `python -m retro_jax prepare` with the same config first"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path / MANIFEST} is corrupted; {_rebuild_hint(path)}") from None
    if manifest.get("kind") != kind:
        raise UserError(f"{path} holds {manifest.get('kind')!r}, not {kind!r}; check the folder given")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('format_version')}, this program reads {FORMAT_VERSION}; "
            f"{_rebuild_hint(path)}"
        )
    if manifest.keys() != UNDIGESTED and manifest.get("digest") != _digest_json(_without(manifest, "digest")):
        raise UserError(f"{path / MANIFEST} is corrupted (its digest is not that of what it says); {_rebuild_hint(path)}")
    for name, facts in manifest["files"].items():
        _check_file(path, name, facts, checksums)
    return Artefact(path, manifest)


def remove_artefact(path: Path) -> None:
    """Delete an artefact and what a killed build of it left."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it is whole or not there."""
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_noted(path: Path, data: bytes) -> None:
    """Write a file that a killed build leaves to the next one, and beside it its checksum."""
    write_bytes(path, data)
    write_text(_note(path), hashlib.sha256(data).hexdigest())


def is_as_noted(path: Path) -> bool:
    """Whether a file of :func:`write_noted` is there and is what was written; says so where it is something else."""
    if not path.exists() or not _note(path).exists():
        return False
    with open(path, "rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest().encode() == _note(path).read_bytes()
    if not whole:
        print(f"{path} is corrupted (its checksum is not the one that was noted); it is made anew", file=sys.stderr)
    return whole


def unlink_noted(path: Path) -> None:
    """Remove a file of :func:`write_noted`."""
    path.unlink(missing_ok=True)
    _note(path).unlink(missing_ok=True)


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _plain(value: Mapping) -> dict:
    return json.loads(json.dumps(value, default=lambda x: x.item() if isinstance(x, np.generic) else str(x)))


def _without(manifest: Mapping, name: str) -> dict:
    return {key: value for key, value in manifest.items() if key != name}


def _digest_json(value: Mapping) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=4096)
def _digest_file(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sweep(partial: Path) -> None:
    """Remove what a killed build left that nobody takes up: files half-written, blocks half-deleted, a manifest."""
    shutil.rmtree(partial / DROPPED, ignore_errors=True)
    (partial / MANIFEST).unlink(missing_ok=True)
    for path in partial.rglob("*.tmp*"):
        path.unlink(missing_ok=True)


def _plan_of(partial: Path) -> Mapping | None:
    """What a killed build was to make; one that cannot be read is named, and what it left is dropped."""
    try:
        return json.loads((partial / PLAN).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        print(f"{partial / PLAN} is corrupted; what stands beside it is not taken up, it is made anew", file=sys.stderr)
    for path in partial.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None


def _file_facts(partial: Path) -> dict:
    """Size and SHA-256 of the files of an artefact that is ready."""
    facts = {}
    own = (path for path in partial.iterdir() if path.name not in (BLOCKS, PLAN, LOCK))
    for path in sorted(p for top in own for p in (top.rglob("*") if top.is_dir() else [top]) if p.is_file()):
        stat = path.stat()
        facts[str(path.relative_to(partial))] = {
            "bytes": stat.st_size,
            "sha256": _digest_file(path, stat.st_size, stat.st_mtime_ns),
        }
    return facts


def _check_file(folder: Path, name: str, facts: Mapping, checksums: Checksums) -> None:
    path = folder / name
    if not path.exists():
        raise UserError(f"{path} is missing; {_rebuild_hint(folder)}")
    stat = path.stat()
    if stat.st_size != facts["bytes"]:
        raise UserError(f"{path} has {stat.st_size} bytes instead of {facts['bytes']} (truncated?); {_rebuild_hint(folder)}")
    if checksums == "all":
        _digest_file.cache_clear()  # a byte that a disk has lost changes no time
    checked = checksums == "all" or (checksums == "small" and stat.st_size <= CHECKSUM_ON_OPEN_BYTES)
    if checked and _digest_file(path, stat.st_size, stat.st_mtime_ns) != facts["sha256"]:
        raise UserError(f"{path} is corrupted (its checksum is not the manifest's); {_rebuild_hint(folder)}")


def _rebuild_hint(path: Path) -> str:
    return f"rebuild it with `python -m retro_jax prepare --config FILE --rebuild {path.name}`"


def _refuse_other(path: Path, wanted: Mapping, found: Mapping) -> None:
    for part in ("kind", "format_version"):
        if found.get(part) != wanted[part]:
            raise UserError(f"{path} has {part} {found.get(part)!r}, but {wanted[part]!r} is wanted; {_rebuild_hint(path)}")
    for part, noun in (("settings", "setting"), ("inputs", "input")):
        have, want = found[part], wanted[part]
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise UserError(
                    f"{path} was built with {noun} {name}={have.get(name)!r}, now {name}={want.get(name)!r} is asked for; "
                    f"use another --workdir, or {_rebuild_hint(path)}"
                )


@contextmanager
def _disk_full_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full while building {path}; free some space and run again, finished blocks are kept"
            ) from error
        raise
