"""Figures worked out by hand on a few documents, and intervals against a plain bootstrap."""

import numpy as np
import pytest

from retro_jax.evaluation.figures import figures, sum_documents
from retro_jax.evaluation.scores import ChunkScores

LN2 = np.log(2.0)
# Chunks: document 0 has two, document 1 one, document 2 was not scored, document 3 one.
DOCUMENT = np.array([0, 0, 1, 2, 3])
OVERLAP = np.array([0.125, 0.2, 0.5, 0.0, 1.0])


def scores(bits, targets=(4, 4, 2, 0, 4), text_bytes=(8, 6, 5, 0, 1)):
    return ChunkScores(nats_N=np.array(bits) * LN2, targets_N=np.array(targets), bytes_N=np.array(text_bytes))


def result(**settings):
    both = {"gpt": scores([16.0, 12.0, 20.0, 0.0, 8.0]), "retro": scores([18.0, 9.0, 10.0, 0.0, 1.0])}
    return figures(sum_documents(both, OVERLAP, DOCUMENT), [("gpt", "retro")], **{"samples": 2000, "seed": 0, **settings})


def test_values_by_hand():
    gpt, retro = (result()["models"][name] for name in ("gpt", "retro"))
    assert gpt["loss"]["value"] == pytest.approx(56 * LN2 / 14)
    assert gpt["perplexity"]["value"] == pytest.approx(16.0)
    assert gpt["bits_per_byte"]["value"] == pytest.approx(56 / 20)
    assert [gpt["by_overlap"][a]["value"] for a in ("0.125", "0.25", "0.5", "1.0")] == pytest.approx(
        [2.0, 28 / 14, 48 / 19, 56 / 20]
    )
    assert [retro["by_overlap"][a]["value"] for a in ("0.125", "0.25", "0.5", "1.0")] == pytest.approx(
        [18 / 8, 27 / 14, 37 / 19, 38 / 20]
    )
    assert [retro["by_band"][a]["value"] for a in ("0.125", "0.25", "0.5", "1.0")] == pytest.approx([18 / 8, 9 / 6, 2.0, 1.0])
    share = result()["bytes_share"]
    assert list(share["by_overlap"].values()) == pytest.approx([0.4, 0.7, 0.95, 1.0])
    assert list(share["by_band"].values()) == pytest.approx([0.4, 0.3, 0.25, 0.05])


def test_differences_by_hand():
    difference = result()["differences"]["gpt - retro"]
    assert difference["bits_per_byte"]["value"] == pytest.approx(18 / 20)
    assert difference["loss"]["value"] == pytest.approx(18 * LN2 / 14)
    assert difference["by_band"]["0.125"]["value"] == pytest.approx(-2 / 8)
    assert difference["by_band"]["1.0"]["value"] == pytest.approx(7.0)


def test_nothing_in_a_band():
    one = {"gpt": scores([16.0, 12.0, 20.0, 0.0, 8.0])}
    found = figures(sum_documents(one, np.zeros(5), DOCUMENT), [], samples=10, seed=0)
    assert found["models"]["gpt"]["by_band"]["1.0"] == {"value": None, "low": None, "high": None}
    assert found["models"]["gpt"]["by_overlap"]["0.125"]["value"] == pytest.approx(56 / 20)


def test_intervals_are_those_of_drawing_whole_documents_with_replacement():
    random = np.random.default_rng(1)
    document = np.sort(random.integers(0, 60, 400))
    text_bytes, targets = random.integers(50, 90, 400), random.integers(10, 20, 400)
    level = random.normal(2.0, 0.5, 60)[document]
    gpt = ChunkScores(nats_N=text_bytes * level * LN2, targets_N=targets, bytes_N=text_bytes)
    retro = ChunkScores(
        nats_N=text_bytes * (level - random.normal(0.1, 0.05, 60)[document]) * LN2, targets_N=targets, bytes_N=text_bytes
    )
    found = figures(
        sum_documents({"gpt": gpt, "retro": retro}, np.zeros(400), document), [("gpt", "retro")], samples=4000, seed=3
    )

    documents = np.unique(document)
    bits = {name: np.array([s.bits_N[document == d].sum() for d in documents]) for name, s in (("gpt", gpt), ("retro", retro))}
    sizes = np.array([text_bytes[document == d].sum() for d in documents])
    draws = random.integers(0, len(documents), (4000, len(documents)))
    value = bits["gpt"][draws].sum(1) / sizes[draws].sum(1)
    difference = value - bits["retro"][draws].sum(1) / sizes[draws].sum(1)
    # Two bootstraps of 4000 draws: quantiles differ by about 2% of the spread.
    for figure, sample in (
        (found["models"]["gpt"]["bits_per_byte"], value),
        (found["differences"]["gpt - retro"]["bits_per_byte"], difference),
    ):
        assert [figure["low"], figure["high"]] == pytest.approx(np.quantile(sample, [0.025, 0.975]), abs=0.2 * sample.std())
    # Paired: much tighter than either model's own interval.
    spread = {
        k: f["high"] - f["low"]
        for k, f in (
            ("own", found["models"]["gpt"]["bits_per_byte"]),
            ("paired", found["differences"]["gpt - retro"]["bits_per_byte"]),
        )
    }
    assert spread["paired"] < 0.25 * spread["own"]


def test_one_document_has_no_spread():
    only = {"gpt": ChunkScores(nats_N=np.array([3.0]), targets_N=np.array([2]), bytes_N=np.array([4]))}
    figure = figures(sum_documents(only, np.zeros(1), np.zeros(1, int)), [], samples=50, seed=0)["models"]["gpt"]["loss"]
    assert figure == {"value": 1.5, "low": 1.5, "high": 1.5}


def test_scores_over_other_targets_are_refused():
    with pytest.raises(ValueError, match="'retro' and 'gpt' are over different targets"):
        sum_documents({"gpt": scores([0] * 5), "retro": scores([0] * 5, targets=(4, 4, 3, 0, 4))}, OVERLAP, DOCUMENT)
