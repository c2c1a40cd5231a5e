"""Metrics of answers against what their publications and libraries give, worked out by hand here."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from retro_jax.evaluation.answers import chosen, exact_match, f1, f1_first, normalised, rouge, without_label


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Denver Broncos!", "denver broncos"),
        ("a man, an apple and the theme", "man apple and theme"),
        ("U.S.A.", "usa"),
        ("twenty-two", "twentytwo"),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation goes, as in the published script
        ("The", ""),
    ],
)
def test_normalisation_is_that_of_squad(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_exact_match_and_f1_of_squad() -> None:
    """The example of SQuAD's paper, and of its script's conventions."""
    golds = ["Denver Broncos", "The Denver Broncos", "Broncos"]
    assert exact_match("the Denver Broncos.", golds) == 1.0 and exact_match("Carolina", golds) == 0.0
    assert f1("Denver Broncos team", ["Denver Broncos"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert f1("Denver Denver", ["Denver Broncos"]) == pytest.approx(0.5)  # a token counts as often as it stands in both
    assert f1("Broncos of Denver", golds) == pytest.approx(0.8)  # best of 0.8, 0.8 and 0.5
    assert f1("the", ["a"]) == 1.0 and f1("the", ["x"]) == 0.0 and f1("x", ["the"]) == 0.0


def test_f1_of_the_reference_code_looks_at_the_first_answer_and_splits_at_punctuation() -> None:
    assert f1_first("Broncos", ["Denver", "Broncos"]) == 0.0 and f1("Broncos", ["Denver", "Broncos"]) == 1.0
    assert f1_first("twenty-two", ["twenty two"]) == 1.0 and f1("twenty-two", ["twenty two"]) == 0.0
    assert f1_first("the", ["a"]) == 0.0


def test_rouge_is_the_best_over_the_gold_answers() -> None:
    """By hand: "the cat sat on the mat" has 6 unigrams, 5 bigrams; "the cat lay on the mat" shares 5 and 3, its LCS 5."""
    assert rouge("the cat sat on the mat", ["nothing like it", "the cat lay on the mat"]) == pytest.approx((5 / 6, 3 / 5, 5 / 6))
    long = "Police killed the gunman after he had fired at officers", ["the gunman was killed by police", "officers fired"]
    library = [RougeScorer(["rouge1", "rouge2", "rougeL"]).score(gold, long[0]) for gold in long[1]]
    assert rouge(*long) == tuple(max(one[name].fmeasure for one in library) for name in ("rouge1", "rouge2", "rougeL"))


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("Yes, it can.", ["Yes", "No"], 0),
        ("no", ["Yes", "No"], 1),
        ("I do not know", ["Yes", "No"], None),
        ("Nothing, yes", ["Yes", "No"], 0),  # whole words
        ("in New York City", ["New York", "New York City"], 1),
        ("No. Yes.", ["Yes", "No"], 1),
    ],
)
def test_the_choice_that_is_named_first(answer: str, choices: list[str], expected: int | None) -> None:
    assert chosen(answer, choices) == expected


@pytest.mark.parametrize("text", ["Answer: Paris", " A: Paris", "The answer is: Paris ", "Paris"])
def test_labels_are_no_part_of_the_answer(text: str) -> None:
    assert without_label(text) == "Paris"
    assert without_label("A Paris") == "A Paris"
