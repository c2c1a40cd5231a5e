"""Texts that go round in circles: the two published definitions of repetition.

The words of Wang et al. (2023), "Shall We Pretrain Autoregressive Language Models with Retrieval?": a text whose end repeats a
phrase of at least two tokens at least three times. The code that they cite (Holtzman et al. 2020, "The Curious Case of Neural
Text Degeneration") counts otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 90
SHORTEST_PHRASE, TIMES = 2, 3


def ends_in_repetition(tokens: Sequence[int]) -> bool:
    """Whether the end is a phrase of two tokens or more, three times or more: the paper's definition."""
    phrases = range(SHORTEST_PHRASE, len(tokens) // TIMES + 1)
    return any(_times(tokens, length, TIMES) >= TIMES for length in phrases)


def degenerates(tokens: Sequence[int]) -> bool:
    """Holtzman et al.'s definition: of the phrases of 1 to 90 tokens that the text ends in, take the one that stands there most
    often in a row, of equals the shortest; it is repetition if it stands there more than once, and has at least three tokens or
    stands there more than 50 times."""
    if not tokens:
        return False
    counts = [_times(tokens, length) for length in range(1, min(LONGEST, len(tokens)) + 1)]
    most = max(counts)
    length = counts.index(most) + 1
    return most > 1 and (length >= 3 or most > 50)


def _times(tokens: Sequence[int], length: int, enough: int | None = None) -> int:
    """How many times in a row the last ``length`` tokens stand at the end; counting ends at ``enough``."""
    phrase, count = list(tokens[-length:]), 1
    end = len(tokens) - length
    while end >= length and count != enough and list(tokens[end - length : end]) == phrase:
        count, end = count + 1, end - length
    return count
