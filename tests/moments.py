"""``python -m retro_jax`` in a process that stops (SIGSTOP) at a chosen moment of building a folder, so that a test can kill it
there; moments are counted in the files that the process opens, makes, moves and removes in it.

    python -m tests.moments count FILE ARGUMENTS...                   how many moments each folder has, as JSON, into FILE
    python -m tests.moments stop FOLDER MOMENT SECONDS ARGUMENTS...   stop so many seconds after this moment, and in any case
                                                                      before FOLDER is renamed
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

from retro_jax.cli import main

EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir")


def path_of(event: str, arguments: tuple) -> str:
    """What the event is about, where it lies in a ``.partial`` folder or moves one; else nothing."""
    if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
        return ""
    path = os.fspath(arguments[0])
    return path if ".partial/" in path or (event == "os.rename" and path.endswith(".partial")) else ""


def count(file: Path) -> None:
    """Write the number of moments of each folder when the process ends."""
    moments: Counter[str] = Counter()

    def hook(event: str, arguments: tuple) -> None:
        if path := path_of(event, arguments):
            moments[path.split(".partial")[0] + ".partial"] += 1

    atexit.register(lambda: file.write_text(json.dumps(moments)))
    sys.addaudithook(hook)


def stop(folder: Path, moment: int, seconds: float) -> None:
    """Stop this process as told above; it goes on when it is sent SIGCONT."""
    passed = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal passed
        path = path_of(event, arguments)
        if path == str(folder):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif path.startswith(f"{folder}/"):
            passed += 1
            if passed == moment:
                timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGSTOP))
                timer.daemon = True
                timer.start()

    sys.addaudithook(hook)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "count":
        count(Path(rest[0]))
        sys.exit(main(rest[1:]))
    stop(Path(rest[0]), int(rest[1]), float(rest[2]))
    sys.exit(main(rest[3:]))
