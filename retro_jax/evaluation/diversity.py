"""How varied texts are: Self-BLEU (Zhu et al. 2018) and the Zipf coefficient, as the code of Holtzman et al. (2020) has them."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import numpy as np

SMOOTHING = 0.1  # the count that stands for none: NLTK's smoothing method 1


def self_bleu(texts: Sequence[Sequence[int]], *, sampled: int, longest: int = 4, seed: int = 0) -> np.ndarray:
    """BLEU of some texts against all others as references, float [texts taken]; their mean is Self-BLEU.

    NLTK's sentence BLEU with uniform weights over n-grams of 1 to ``longest`` tokens and smoothing method 1, to the last digits.
    NLTK counts 5,000 references anew for each text; an n-gram's count is clipped at its highest among the others, and for that
    its two highest over all texts suffice, counted once.

    Args:
        texts: tokens of each.
        sampled: how many of them are taken, without replacement; all where there are fewer.
        longest: the longest n-grams.
        seed: of the draw.
    """
    taken = np.sort(np.random.default_rng(seed).permutation(len(texts))[:sampled])
    tables = [_highest(texts, n) for n in range(1, longest + 1)]
    lengths = collections.Counter(map(len, texts))
    return np.array([_bleu(texts[number], number, tables, lengths) for number in taken])


def zipf_coefficient(texts: Sequence[Sequence[int]], *, ranks: int = 5000) -> float | None:
    """Minus the slope of the least-squares line of log frequency on log rank, over the ``ranks`` most frequent tokens; None where
    there are fewer than two different ones."""
    counts = collections.Counter(token for text in texts for token in text)
    frequencies = np.array([count for _, count in counts.most_common(ranks)], np.float64)
    if len(frequencies) < 2:
        return None
    slope, _ = np.polyfit(np.log(np.arange(1, len(frequencies) + 1)), np.log(frequencies), 1)
    return float(-slope)


def _ngrams(text: Sequence[int], n: int) -> collections.Counter:
    return collections.Counter(zip(*(text[start:] for start in range(n)), strict=False))


# Of an n-gram: its highest count in one text, that text's number, and the highest count among the other texts.
_Highest = dict[tuple, tuple[int, int, int]]


def _highest(texts: Sequence[Sequence[int]], n: int) -> _Highest:
    table: _Highest = {}
    for number, text in enumerate(texts):
        for ngram, count in _ngrams(text, n).items():
            first, of, second = table.get(ngram, (0, -1, 0))
            table[ngram] = (count, number, first) if count > first else (first, of, max(second, count))
    return table


def _bleu(text: Sequence[int], number: int, tables: Sequence[_Highest], lengths: collections.Counter) -> float:
    logs = []
    for n, table in enumerate(tables, 1):
        counts = _ngrams(text, n)
        clipped = sum(min(count, _elsewhere(table[ngram], number)) for ngram, count in counts.items())
        if n == 1 and clipped == 0:
            return 0.0
        logs.append(math.log((clipped or SMOOTHING) / max(1, counts.total())))
    others = lengths - collections.Counter([len(text)])
    closest = min(others, key=lambda length: (abs(length - len(text)), length))
    brevity = min(0.0, 1 - closest / len(text))
    return math.exp(brevity + math.fsum(logs) / len(logs))


def _elsewhere(highest: tuple[int, int, int], number: int) -> int:
    first, of, second = highest
    return second if of == number else first
