"""How right an answer is: exact match, F1, ROUGE and accuracy, each as published.

Exact match and F1 are those of SQuAD's evaluation (Rajpurkar et al. 2016): the best over all gold answers. ROUGE is Google's
rouge-score, without stemming, the best F-measure over all gold answers.
"""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

ROUGES = ("rouge1", "rouge2", "rougeL")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACED_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
# What models put before an answer because their prompt has it.
_LABEL = re.compile(r"^\s*(?:(?:the )?answer(?: is)?\s*:|a\s*:)\s*", re.IGNORECASE)


def without_label(answer: str) -> str:
    """The answer without a leading "Answer:" or "A:", and without space around it."""
    return _LABEL.sub("", answer).strip()


def normalised(text: str) -> str:
    """SQuAD's normalisation: lower case, ASCII punctuation deleted, then articles, then space collapsed."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 where the normalised answer is a normalised gold answer, else 0."""
    return float(any(normalised(answer) == normalised(gold) for gold in golds))


def f1(answer: str, golds: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall of normalised tokens, over the gold answers; where one of two has no token,
    1 if neither has one and else 0, as in SQuAD 2.0."""
    return max(_token_f1(normalised(answer).split(), normalised(gold).split()) for gold in golds)


def f1_first(answer: str, golds: Sequence[str]) -> float:
    """As the reference code of InstructRetro computes it: against the first gold answer alone, with ParlAI's normalisation, which
    turns punctuation into space; 0 where either has no token."""
    answer_tokens, gold_tokens = (
        _ARTICLES.sub(" ", text.lower().translate(_SPACED_PUNCTUATION)).split() for text in (answer, golds[0])
    )
    return _token_f1(answer_tokens, gold_tokens) if answer_tokens and gold_tokens else 0.0


def rouge(answer: str, golds: Sequence[str]) -> tuple[float, ...]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, each the best over the gold answers."""
    scores = [_scorer().score(gold, answer) for gold in golds]
    return tuple(max(score[name].fmeasure for score in scores) for name in ROUGES)


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Which of the choices the answer names first; of those that begin at one place, the longest. None: it names none."""
    words, named = _words(answer), [_words(choice) for choice in choices]
    for start in range(len(words)):
        there = [(len(of), number) for number, of in enumerate(named) if of and words[start : start + len(of)] == of]
        if there:
            return max(there, key=lambda found: (found[0], -found[1]))[1]
    return None


def _words(text: str) -> list[str]:
    return normalised(text).split()


def _token_f1(answer: Sequence[str], gold: Sequence[str]) -> float:
    if not answer or not gold:
        return float(list(answer) == list(gold))
    common = sum((collections.Counter(answer) & collections.Counter(gold)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(gold)
    return 2 * precision * recall / (precision + recall)


@functools.cache
def _scorer() -> RougeScorer:
    return RougeScorer(list(ROUGES), use_stemmer=False)
