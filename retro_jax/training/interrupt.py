"""SIGTERM and SIGINT as a request that the training loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """``signal`` is what asked to stop; None as long as nothing did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def leave(self, message: str) -> None:
        """End the program as its caller expects: exit code 0 after SIGTERM, KeyboardInterrupt after SIGINT."""
        print(message, flush=True)
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(0)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take SIGTERM and SIGINT as requests while the block runs; the second one acts as it always does.

    Outside the main thread, where Python allows no handlers, nothing is taken.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def take(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        for name, handler in before.items():
            signal.signal(name, handler)
        print(f"{request.signal.name}: saving a checkpoint; once more stops at once", flush=True)

    for number in before:
        signal.signal(number, take)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
