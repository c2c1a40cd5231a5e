"""The formulas against numbers made by hand, and the cases' counts against their masks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.kernel_cases import BOTH, CHECK_CASES, CPU_CASES, FORWARD, GPU_CASES, AttentionCase, CcaCase, causal, loss
from benchmarks.kernel_costs import Attended, Cost, attention_backward, attention_forward
from benchmarks.kernel_programs import MOST_SETS, sets_of


def chunk_head(width: int = 64, neighbours: int = 2, heads: int = 1) -> Attended:
    """One chunk and one key head, bfloat16."""
    keys = 128 * neighbours
    return Attended(
        queries=64, keys=keys, valid_keys=keys, pairs=64 * keys, heads=heads, groups=1, width=width, itemsize=2
    )  # fmt: skip


@pytest.mark.parametrize(
    ("width", "forward", "backward"),
    [(64, (4_194_304, 82_176), (10_485_760, 164_352)), (128, (8_388_608, 164_096), (20_971_520, 328_192))],
)
def test_a_chunk_and_head(width, forward, backward):
    """4 m n d and 2 (2m + 2n) d + 4m; 10 m n d and 2 (4m + 4n) d + 8m, at m = 64, n = 256."""
    a = chunk_head(width)
    assert attention_forward(a) == Cost(*forward)
    assert attention_backward(a) == Cost(*backward)


@pytest.mark.parametrize(("heads", "intensity"), [(1, 51.2), (2, 85.3), (4, 128.0), (8, 170.7)])
def test_grouped_queries_share_keys(heads, intensity):
    """m n / (m + n / g), without the log-sum-exp's 4 m."""
    cost = attention_forward(chunk_head(heads=heads))
    assert round(cost.flops / (cost.bytes - 4 * 64 * heads), 1) == intensity


def test_a_floor_is_the_longer_of_computing_and_moving():
    cost = attention_forward(chunk_head())
    assert cost.floor(989e12, 3.35e12) == pytest.approx(24.5e-9, rel=2e-3)  # an H100's data sheet
    assert cost.limit(989e12, 3.35e12) == "memory"
    assert cost.floor(1e12, 3.35e12) == pytest.approx(4.194304e-6)
    assert cost.limit(1e12, 3.35e12) == "compute"


def test_masked_keys_are_not_read_but_their_gradients_are_written():
    full = chunk_head()
    half = dataclasses.replace(full, valid_keys=128, pairs=64 * 128)
    assert attention_forward(full).bytes - attention_forward(half).bytes == 2 * 2 * 128 * 64
    assert attention_backward(full).bytes - attention_backward(half).bytes == 2 * 2 * 128 * 64
    assert attention_backward(half).flops == 5 * 64 * 256 * 64


def test_chunked_cross_attention_counts_readers_and_valid_keys():
    case = CcaCase(rows=1, chunks=2, heads=3, groups=1, width=8)
    assert case.costs(2)[FORWARD].flops == 4 * (64 + 1) * 256 * 3 * 8  # the row's last chunk has its last token alone
    absent = dataclasses.replace(case, rows=64, absent=True)
    valid = absent.given()["valid"].reshape(64, 2, 2, 2, 64)
    assert absent.costs(2)[FORWARD].flops == 4 * 3 * 8 * int(valid.sum((2, 3, 4)) @ np.array([64, 1]) @ np.ones(64))
    assert 0.45 < valid.mean() < 0.6
    assert valid.any((2, 3, 4)).all()  # rivals give other numbers where there is no key
    assert (valid[..., 0, :] >= valid[..., 1, :]).all()  # the continuation is what is missing


def test_causal_attention_has_half_of_the_pairs_and_documents_have_their_own():
    whole, parts = causal(1, 8, 1, 4), causal(1, 8, 1, 4, segments=2)
    assert whole.costs(2)[FORWARD].flops == 4 * 36 * 4
    assert whole.costs(2)[BOTH].flops == 14 * 36 * 4
    assert parts.costs(2)[FORWARD].flops == 4 * (10 + 10) * 4
    np.testing.assert_array_equal(parts.given()["segments"], [[1, 1, 1, 1, 2, 2, 2, 2]])


def test_lengths_count_for_pairs_and_bytes():
    case = AttentionCase(label="x", problems=4, queries=8, keys=8, heads=1, groups=1, width=4, mask="lengths")
    assert sorted(case.given()["lengths"]) == [4, 4, 8, 8]
    assert case.costs(2)[FORWARD] == Cost(4 * 24 * 8 * 4, 2 * 4 * (2 * 32 + 2 * 24) + 4 * 32)


def test_a_loss_has_one_product_forward_and_three_in_all():
    costs = loss(32768, 2560, 128256).costs(2)
    assert costs[FORWARD].flops == pytest.approx(32.58e-3 * 660e12, rel=1e-3)  # time and rate that marin published
    assert costs[BOTH].flops == 3 * costs[FORWARD].flops
    assert costs[BOTH].bytes == 2 * 2 * (32768 + 128256) * 2560 + 8 * 32768


def test_short_kernels_get_as_many_inputs_as_no_cache_holds():
    assert (sets_of(1e9), sets_of(21e6), sets_of(1)) == (1, 8, MOST_SETS)


def test_names_tell_cases_apart():
    for cases in (GPU_CASES, CPU_CASES, CHECK_CASES):
        assert len({case.name for case in cases}) == len(cases)
