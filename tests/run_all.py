"""Run every test, slow ones too, two files at a time, and record the result in benchmarks/results/.

A file that has passed is not run again until something in the repository changes, so a run that was interrupted continues.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
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
    source = source_digest()
    earlier = json.loads(result_path.read_text()) if result_path.exists() else {}
    files = earlier.get("files", {}) if earlier.get("source") == source else {}
    names = [str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))]
    waiting = []
    for name in names:
        if not failed(files.get(name)):
            print(f"{name}: passed before")
            continue
        waiting.append(name)
    with ThreadPoolExecutor(max_workers=JOBS) as executor:
        for done in as_completed({executor.submit(run, name, interpreter) for name in waiting}):
            files |= done.result()
            result_path.parent.mkdir(parents=True, exist_ok=True)
            result_path.write_text(json.dumps(result(source, files, names), indent=2) + "\n")
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


def result(source: str, files: dict, names: list[str]) -> dict:
    """What the JSON file holds."""
    entries = [files[name] for name in names if name in files]
    return {
        "command": "make test-all",
        "complete": len(entries) == len(names) and not any(map(failed, entries)),
        "seconds_of_all_files": round(sum(entry["seconds"] for entry in entries), 1),
        **{count: sum(entry[count] for entry in entries) for count in COUNTS},
        "source": source,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "files": files,
    }


def source_digest() -> str:
    """Changes with every file of the repository except documents and results."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True, check=True).stdout
    digest = hashlib.sha256()
    for name in sorted(listed.decode().split("\0")):
        path = REPOSITORY / name
        if name and not name.startswith(("docs/", "benchmarks/")) and path.suffix != ".md" and path.is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
