"""Repetition, Self-BLEU and Zipf against vectors by hand, the published code's cases, and NLTK."""

from __future__ import annotations

import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from retro_jax.evaluation.diversity import self_bleu, zipf_coefficient
from retro_jax.evaluation.intervals import means_with_intervals
from retro_jax.evaluation.repetition import degenerates, ends_in_repetition


@pytest.mark.parametrize(
    ("tokens", "paper", "code"),
    [
        ([1, 2, 3, 1, 2, 1, 2, 1, 2], True, False),  # "1 2" three times: a phrase of two, but the code wants three tokens
        ([5, 1, 2, 3, 1, 2, 3], False, True),  # twice is enough for the code where the phrase has three
        ([5, 1, 2, 3, 1, 2, 3, 1, 2, 3], True, True),
        ([1, 2, 1, 2, 1, 2, 9], False, False),  # not at the end
        ([7] * 6, True, False),  # "7 7" three times; the code sees one token six times
        ([7] * 51, True, True),
        ([7] * 50, True, False),
        ([], False, False),
        ([4], False, False),
    ],
)
def test_repetition_by_both_definitions(tokens: list[int], paper: bool, code: bool) -> None:
    assert (ends_in_repetition(tokens), degenerates(tokens)) == (paper, code)


@pytest.mark.parametrize("longest", [2, 4, 5])
def test_self_bleu_is_nltk_s(longest: int) -> None:
    """Random texts, some of them equal, empty or shorter than the n-grams."""
    rng = np.random.default_rng(longest)
    texts = [rng.integers(0, 6, rng.integers(0, 25)).tolist() for _ in range(30)]
    texts += [texts[3], [9, 9, 9], [1], []]
    weights = (1 / longest,) * longest
    smoothing = SmoothingFunction().method1
    expected = [
        sentence_bleu([*texts[:n], *texts[n + 1 :]], text, weights, smoothing_function=smoothing) for n, text in enumerate(texts)
    ]
    np.testing.assert_allclose(self_bleu(texts, sampled=len(texts), longest=longest), expected, rtol=1e-12)


def test_self_bleu_takes_a_sample() -> None:
    texts = np.random.default_rng(0).integers(0, 9, (40, 12)).tolist()
    all_of_them, some = self_bleu(texts, sampled=40), self_bleu(texts, sampled=10, seed=3)
    assert len(some) == 10 and set(some) <= set(all_of_them)


def test_zipf_s_law_has_its_exponent() -> None:
    """Counts 2520 / rank and 3600 / rank squared, exactly."""
    for exponent, most, ranks in ((1.0, 2520, 10), (2.0, 3600, 6)):
        texts = [[rank] * round(most / rank**exponent) for rank in range(1, ranks + 1)]
        assert zipf_coefficient(texts) == pytest.approx(exponent, abs=1e-9)
    assert zipf_coefficient([[1, 1, 1, 2]], ranks=2) == pytest.approx(np.log(3) / np.log(2))
    assert zipf_coefficient([[1, 1]]) is None


def test_intervals_hold_the_mean_and_are_reproduced() -> None:
    scores = {"em": np.array([0.0, 1.0, 1.0, 0.0] * 50), "f1": np.linspace(0, 1, 200)}

    def both(means: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"both": np.sqrt(means["em"] * means["f1"])}

    found = means_with_intervals(scores, samples=2000, seed=1, combined=both)
    assert found == means_with_intervals(scores, samples=2000, seed=1, combined=both)
    assert found["em"]["value"] == 0.5 and found["both"]["value"] == pytest.approx(0.5)
    # A proportion of one half over 200 items: 1.96 standard errors are 0.0693.
    assert found["em"]["low"] == pytest.approx(0.5 - 0.0693, abs=0.01) and found["em"]["high"] == pytest.approx(0.5693, abs=0.01)
