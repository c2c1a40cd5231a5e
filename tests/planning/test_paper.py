"""The paper's formulas in integers, against its tables and its own figures."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest

from retro_jax.planning.paper import (
    MODELS,
    extra_bytes,
    full_flops,
    layer_bytes,
    model_flops,
    selective_flops,
    stage_bytes,
    terms,
)


@pytest.mark.parametrize("name", MODELS)
def test_terms_sum_to_the_published_formulas(name: str) -> None:
    model = MODELS[name]
    sbh, t = model.sbh, model.tensor
    core = 5 * model.heads * model.seq_len**2 * model.microbatch
    parts = {part: sum(term.size for term in terms(model) if term.part == part) for part in ("attention", "mlp", "norms")}
    assert parts == {"attention": 11 * sbh + core, "mlp": 19 * sbh, "norms": 4 * sbh}
    assert layer_bytes(model, sequence=False, policy="none") == 10 * sbh + 24 * sbh // t + core // t
    assert layer_bytes(model, sequence=True, policy="none") == (34 * sbh + core) // t
    assert layer_bytes(model, sequence=False, policy="selective") == 10 * sbh + 24 * sbh // t
    assert layer_bytes(model, sequence=True, policy="selective") == 34 * sbh // t
    assert layer_bytes(model, sequence=True, policy="full") == 2 * sbh


@pytest.mark.parametrize(
    ("name", "sequence", "selective", "both", "full", "gib"),
    [
        ("22B", 66.8, 49.4, 16.1, 7.6, 59.2), ("175B", 62.0, 56.5, 18.5, 8.7, 66.8), ("530B", 58.3, 61.9, 20.2, 9.5, 114.0),
        ("1T", 58.3, 61.9, 20.2, 9.5, 131.2),
    ],
)  # fmt: skip
def test_shares_of_what_tensor_parallelism_alone_keeps(
    name: str, sequence: float, selective: float, both: float, full: float, gib: float
) -> None:
    """Figure 7, and the first stage with what interleaving adds, worked out by hand from the equations."""
    model = MODELS[name]
    base = layer_bytes(model, sequence=False, policy="none")

    def share(sequence: bool, policy: str) -> float:
        return round(100 * layer_bytes(model, sequence=sequence, policy=policy) / base, 1)  # type: ignore[arg-type]

    shares = share(True, "none"), share(False, "selective"), share(True, "selective"), share(True, "full")
    assert shares == (sequence, selective, both, full)
    in_flight = stage_bytes(model, sequence=False, policy="none")
    assert Fraction(in_flight, base * model.layers) == 1 + Fraction(model.stages - 1, model.stages * model.interleave) * (
        model.interleave > 1
    )
    assert round(in_flight / 2**30, 1) == gib


def test_what_is_kept_beside_the_layers() -> None:
    model = MODELS["22B"]
    layers = stage_bytes(model, sequence=True, policy="none")
    by_equation = Fraction(model.sbh * model.layers, 8) * (
        Fraction(1, model.layers) + Fraction(4, model.layers) * (1 + Fraction(model.vocab, model.width))
    )
    assert extra_bytes(model) == by_equation
    assert round(100 * extra_bytes(model) / layers, 2) == 0.57
    assert extra_bytes(MODELS["1T"]) == MODELS["1T"].sbh * 64 // 8


@pytest.mark.parametrize("name", MODELS)
def test_operations(name: str) -> None:
    model = MODELS[name]
    s, h, L, v = model.seq_len, model.width, model.layers, model.vocab
    unit = 72 * model.batch * L * s * h**2
    assert model_flops(model) == unit * (1 + Fraction(s, 6 * h) + Fraction(v, 12 * h * L))
    assert selective_flops(model) == unit * (1 + Fraction(s, 3 * h) + Fraction(v, 12 * h * L))
    assert full_flops(model) - model_flops(model) == Fraction(unit, 3) * (1 + Fraction(s, 6 * h))
    approximate = 1 + s / (6 * h)
    assert abs(selective_flops(model) / model_flops(model) - approximate) < 0.005


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="heads=64 is not divisible by tensor=7"):
        dataclasses.replace(MODELS["22B"], tensor=7)
    with pytest.raises(ValueError, match=r"layers=48 are not divisible by stages \* interleave = 5"):
        dataclasses.replace(MODELS["22B"], stages=5)
