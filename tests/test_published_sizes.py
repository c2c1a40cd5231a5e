"""Parameter counts of the published configs, found by eval_shape, against those that the papers print."""

from __future__ import annotations

import pytest

from retro_jax.gin_config import load_config
from retro_jax.model import count_parameters, with_vocab

GPT2_VOCAB, INSTRUCTRETRO_VOCAB = 50_257, 256_000


def count(name: str, vocab: int) -> int:
    return count_parameters(with_vocab(load_config([name]).model, vocab))


# Wang et al. 2023, section 3. The counts in millions differ by up to 0.6% (125.3, 355.9, 148.9, 410.5): no one padding of the
# vocabulary gives all four (51,200 gives 126.0, 356.8, 149.6, 411.4). The counts in billions agree to the digit printed.
@pytest.mark.parametrize(
    ("name", "published"), [("gpt_126m", 126e6), ("gpt_357m", 357e6), ("retro_148m", 148e6), ("retro_410m", 410e6)]
)
def test_retro_study_small(name: str, published: float) -> None:
    assert count(name, GPT2_VOCAB) == pytest.approx(published, rel=0.0065)


@pytest.mark.parametrize(
    ("name", "published"), [("gpt_1300m", 1.3), ("gpt_8300m", 8.3), ("retro_1500m", 1.5), ("retro_9500m", 9.5)]
)
def test_retro_study_large(name: str, published: float) -> None:
    assert round(count(name, GPT2_VOCAB) / 1e9, 1) == published


# Wang et al. 2024, table 5.
@pytest.mark.parametrize(
    ("name", "unit", "digits", "published"),
    [
        ("gpt_823m", 1e6, 0, 823),
        ("gpt_2250m", 1e9, 2, 2.25),
        ("gpt_8500m", 1e9, 1, 8.5),
        ("gpt_22b", 1e9, 0, 22),
        ("gpt_43b", 1e9, 0, 43),
        ("instructretro_878m", 1e6, 0, 878),
        ("instructretro_2500m", 1e9, 1, 2.5),
        ("instructretro_9500m", 1e9, 1, 9.5),
        ("instructretro_24b", 1e9, 0, 24),
        ("instructretro_48b", 1e9, 0, 48),
    ],
)
def test_instructretro(name: str, unit: float, digits: int, published: float) -> None:
    assert round(count(name, INSTRUCTRETRO_VOCAB) / unit, digits) == published


def test_cca_layers_follow_the_published_rule() -> None:
    assert load_config(["retro_148m"]).model.cca_layers == (6, 9, 12)
    assert load_config(["retro_410m"]).model.cca_layers == (9, 12, 15, 18, 21, 24)
    assert load_config(["instructretro_48b"]).model.cca_layers[-1] == 48
    assert load_config(["gpt_126m"]).model.cca_layers == ()
