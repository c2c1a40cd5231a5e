"""What every source yields."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the group that may decide its split, its title and its id where the source has them, and where it was read
    ("wiki.jsonl line 17"), for messages."""

    text: str
    group: str
    title: str = ""
    where: str = ""
    id: str = ""
