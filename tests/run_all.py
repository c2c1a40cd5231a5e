"""Run every test, slow ones too, two files at a time, and record the result in benchmarks/results/.

A file that has passed is not run again until something in the repository changes that it could depend on, so a run that was
interrupted continues. Of other files of tests it depends on those that it imports.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
JOBS = 2
COUNTS = ("tests", "failures", "errors", "skipped")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "faiss-cpu", "tokenizers", "pytest")


def main() -> int:
    os.chdir(REPOSITORY)
    interpreter = f"py{sys.version_info[0]}.{sys.version_info[1]}"
    result_path = REPOSITORY / "benchmarks" / "results" / f"test_all_{interpreter}.json"
    names = [str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))]
    sources = source_digests(names)
    earlier = json.loads(result_path.read_text())["files"] if result_path.exists() else {}
    files = {name: entry for name, entry in earlier.items() if entry.get("source") == sources.get(name)}
    waiting = []
    for name in names:
        if not failed(files.get(name)):
            print(f"{name}: passed before")
            continue
        waiting.append(name)
    # What took longest last time begins first, so that neither process waits for the other at the end.
    waiting.sort(key=lambda name: earlier.get(name, {}).get("seconds", 0.0), reverse=True)
    with ThreadPoolExecutor(max_workers=JOBS) as executor:
        for done in as_completed({executor.submit(run, name, interpreter) for name in waiting}):
            files |= {name: {**entry, "source": sources[name]} for name, entry in done.result().items()}
            result_path.parent.mkdir(parents=True, exist_ok=True)
            result_path.write_text(json.dumps(result(files, names), indent=2) + "\n")
    bad = [name for name in names if failed(files.get(name))]
    totals = {count: sum(files[name][count] for name in names) for count in COUNTS}
    passed = totals["tests"] - totals["failures"] - totals["errors"] - totals["skipped"]
    print(f"{interpreter}: {passed} passed, {totals['failures'] + totals['errors']} failed, {totals['skipped']} skipped")
    print(f"written to {result_path.relative_to(REPOSITORY)}" + (f"; failed: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


def run(name: str, interpreter: str) -> dict[str, dict]:
    """Run one file's tests; seconds and counts, by its name."""
    report = REPOSITORY / ".pytest_cache" / f"{interpreter}_{name.replace('/', '_')}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", f"--junit-xml={report}", name], capture_output=True, text=True
    )
    code, seconds = done.returncode, round(time.monotonic() - began, 1)
    print(f"{name}: {done.stdout.splitlines()[-1] if code == 0 else done.stdout + done.stderr}", flush=True)
    if not report.exists():
        return {name: {"seconds": seconds, "exit_code": code, **dict.fromkeys(COUNTS, 0), "errors": 1}}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    return {name: {"seconds": seconds, "exit_code": code, **{count: int(suite.get(count, 0)) for count in COUNTS}}}


def failed(entry: dict | None) -> bool:
    """Whether a file is still to be run: it was not, or it failed."""
    return entry is None or entry["exit_code"] != 0


def result(files: dict, names: list[str]) -> dict:
    """What the JSON file holds."""
    entries = [files[name] for name in names if name in files]
    return {
        "command": "make test-all",
        "complete": len(entries) == len(names) and not any(map(failed, entries)),
        "seconds_of_all_files": round(sum(entry["seconds"] for entry in entries), 1),
        **{count: sum(entry[count] for entry in entries) for count in COUNTS},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "files": files,
    }


def source_digests(names: list[str]) -> dict[str, str]:
    """For each file of tests what changes with it, with those that it imports, and with every other file of the repository except
    documents and results."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True, check=True).stdout
    shared = hashlib.sha256()
    for name in sorted(set(listed.decode().split("\0")) - {"", *names, "tests/run_all.py"}):
        path = REPOSITORY / name
        if not name.startswith(("docs/", "benchmarks/")) and path.suffix != ".md" and path.is_file():
            shared.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    texts = {name: (REPOSITORY / name).read_text() for name in names}
    digests = {}
    for name in names:
        digest = shared.copy()
        for read in sorted(imported(name, texts)):
            digest.update(texts[read].encode())
        digests[name] = digest.hexdigest()[:16]
    return digests


def imported(name: str, texts: dict[str, str]) -> set[str]:
    """A file of tests, and those that it imports, by way of others too."""
    found, left = set[str](), [name]
    while left:
        found.add(name := left.pop())
        modules = re.findall(r"^from (tests[.\w]*\.test_\w+) import", texts[name], re.MULTILINE)
        left += [path for module in modules if (path := module.replace(".", "/") + ".py") not in found]
    return found


if __name__ == "__main__":
    sys.exit(main())
