"""Why something did not run, in a sentence."""

from __future__ import annotations

LONGEST = 240


def reason_of(error: BaseException) -> str:
    """The kind of the error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    told = lines[0].strip() if lines else "no message"
    if len(told) > LONGEST:
        told = told[:LONGEST] + "..."
    return told if isinstance(error, ValueError) else f"{type(error).__name__}: {told}"
