"""One progress bar for everything that takes longer than a few seconds: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """What a stage holds to report its progress."""

    def __init__(self, description: str, total: int | None, progress: Progress | None, *, lines: bool = False) -> None:
        self._description, self._total, self._progress, self._lines = description, total, progress, lines
        self._task = progress.add_task(description, total=total) if progress else None
        self._done, self._started = 0, time.monotonic()
        self._next_line = self._started + SECONDS_BETWEEN_LINES

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report ``count`` more items as done, with a short note (loss, tokens/s) beside the bar."""
        self._done += count
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=count, description=f"{self._description} {note}".rstrip())
        elif self._lines and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            of = f"/{self._total}" if self._total else ""
            print(f"{self._description}: {self._done}{of} {note}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def progress_bar(description: str, total: int | None = None, done: int = 0, *, shown: bool = True) -> Iterator[Bar]:
    """Show progress on standard error while the block runs.

    Args:
        description: what is being done.
        total: number of items, None if not known before.
        done: items that an earlier run has done.
        shown: False shows nothing.
    """
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        bar = Bar(description, total, None, lines=shown)
        bar.advance(done)
        yield bar
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = Bar(description, total, progress)
        bar.advance(done)
        yield bar
