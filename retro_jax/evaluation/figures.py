"""From summed losses to figures: loss, perplexity and bits per byte, also by overlap with the training text, with
document-level bootstrap intervals.

Bits per byte at overlap alpha is the leakage-filtered measure of RETRO (Borgeaud et al. 2022, section 2.6): over the chunks
whose longest token run shared with the training text is at most alpha of their length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from retro_jax.evaluation.scores import ChunkScores

ALPHAS = (0.125, 0.25, 0.5, 1.0)
LEVEL = 0.95
# Values of the weights matrix that exist at a time while resampling.
WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class DocumentSums:
    """Sums by document. ``nats`` and ``bits`` hold a row for each model and mode, in the order of ``names``. Bands part the
    chunks by overlap: band 0 up to ALPHAS[0], band i above ALPHAS[i - 1] up to ALPHAS[i]."""

    names: tuple[str, ...]
    nats_XD: np.ndarray
    bits_XBD: np.ndarray
    bytes_BD: np.ndarray
    targets_D: np.ndarray


@dataclass(frozen=True)
class Totals:
    """The sums of :class:`DocumentSums` over documents, or over many resamples of them (leading axis S)."""

    nats_SX: np.ndarray
    bits_SXB: np.ndarray
    bytes_SB: np.ndarray
    targets_S: np.ndarray

    def loss(self, row: int) -> np.ndarray:
        """Nats a token."""
        return self.nats_SX[:, row] / self.targets_S

    def perplexity(self, row: int) -> np.ndarray:
        """exp of the loss."""
        return np.exp(self.loss(row))

    def bits_per_byte(self, row: int, bands: slice = slice(None)) -> np.ndarray:
        """Over the chunks of some bands; NaN where they have no bytes."""
        bits_S, bytes_S = self.bits_SXB[:, row, bands].sum(-1), self.bytes_SB[:, bands].sum(-1)
        return np.divide(bits_S, bytes_S, out=np.full(len(bits_S), np.nan), where=bytes_S > 0)


def sum_documents(scores: Mapping[str, ChunkScores], overlap_N: np.ndarray, document_N: np.ndarray) -> DocumentSums:
    """Sum chunks by document and overlap band.

    Args:
        scores: by model and mode; all over the same targets.
        overlap_N: share of each chunk that stands in the training text, 0..1.
        document_N: the document of each chunk.

    Raises:
        ValueError: the scores are not over the same targets.
    """
    first = next(iter(scores.values()))
    for name, other in scores.items():
        if not np.array_equal(other.targets_N, first.targets_N) or not np.array_equal(other.bytes_N, first.bytes_N):
            raise ValueError(f"the scores of {name!r} and {next(iter(scores))!r} are over different targets")
    scored = np.flatnonzero(first.targets_N)
    _, document = np.unique(document_N[scored], return_inverse=True)
    documents, bands = int(document.max(initial=-1)) + 1, len(ALPHAS)
    cell = np.searchsorted(ALPHAS, overlap_N[scored]) * documents + document

    def by_band(values_N: np.ndarray) -> np.ndarray:
        return np.bincount(cell, values_N[scored], bands * documents).reshape(bands, documents)

    return DocumentSums(
        tuple(scores),
        np.stack([np.bincount(document, s.nats_N[scored], documents) for s in scores.values()]),
        np.stack([by_band(s.bits_N) for s in scores.values()]),
        by_band(first.bytes_N),
        np.bincount(document, first.targets_N[scored], documents),
    )


def figures(sums: DocumentSums, pairs: Sequence[tuple[str, str]], *, samples: int, seed: int) -> dict:
    """Every figure as ``{"value", "low", "high"}`` (a 95% interval over resampled documents; None where there are no bytes).

    Args:
        sums: by document.
        pairs: (a, b): differences a - b, from the same resamples (paired).
        samples: how many times documents are drawn with replacement.
        seed: of the draws.

    Returns:
        ``models``: for each name ``loss`` (nats a token), ``perplexity``, ``bits_per_byte``, ``by_overlap`` (at most alpha)
        and ``by_band`` (above the last alpha up to this); ``differences``: for each pair "a - b" the differences in loss and
        bits per byte, in the same form; ``bytes_share`` of each alpha and band.
    """
    documents, index = len(sums.targets_D), {name: row for row, name in enumerate(sums.names)}
    whole = _totals(sums, np.ones((1, documents)))
    resampled = _concatenated([_totals(sums, weights) for weights in _resamples(documents, samples, seed)])
    models = {
        name: jax.tree.map(
            _figure,
            {**_measures(whole, row), "perplexity": whole.perplexity(row)},
            {**_measures(resampled, row), "perplexity": resampled.perplexity(row)},
        )
        for name, row in index.items()
    }
    differences = {}
    for a, b in pairs:
        value, draws = (jax.tree.map(np.subtract, _measures(t, index[a]), _measures(t, index[b])) for t in (whole, resampled))
        differences[f"{a} - {b}"] = jax.tree.map(_figure, value, draws)
    share_B = whole.bytes_SB[0] / max(1.0, whole.bytes_SB[0].sum())
    share = {
        "by_overlap": {str(alpha): float(share_B[: band + 1].sum()) for band, alpha in enumerate(ALPHAS)},
        "by_band": {str(alpha): float(share_B[band]) for band, alpha in enumerate(ALPHAS)},
    }
    return {"models": models, "differences": differences, "bytes_share": share}


def _measures(totals: Totals, row: int) -> dict:
    """What differences are taken of: arrays [S] by name."""
    return {
        "loss": totals.loss(row),
        "bits_per_byte": totals.bits_per_byte(row),
        "by_overlap": {str(alpha): totals.bits_per_byte(row, slice(band + 1)) for band, alpha in enumerate(ALPHAS)},
        "by_band": {str(alpha): totals.bits_per_byte(row, slice(band, band + 1)) for band, alpha in enumerate(ALPHAS)},
    }


def _figure(value_1: np.ndarray, draws_S: np.ndarray) -> dict[str, float | None]:
    """A value with the interval of its resamples; those that happen to hold none of a band's bytes say nothing about it."""
    if np.isnan(value_1[0]):
        return {"value": None, "low": None, "high": None}
    low, high = np.nanquantile(draws_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(value_1[0]), "low": float(low), "high": float(high)}


def _totals(sums: DocumentSums, weights_SD: np.ndarray) -> Totals:
    return Totals(
        weights_SD @ sums.nats_XD.T,
        np.einsum("sd,xbd->sxb", weights_SD, sums.bits_XBD, optimize=True),
        weights_SD @ sums.bytes_BD.T,
        weights_SD @ sums.targets_D,
    )


def _resamples(documents: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each document is drawn, for some resamples at a time."""
    random = np.random.default_rng(seed)
    at_once = max(1, WEIGHTS_AT_ONCE // max(1, documents))
    for first in range(0, samples, at_once):
        count = min(at_once, samples - first)
        yield random.multinomial(documents, np.full(documents, 1.0 / documents), size=count).astype(np.float64)


def _concatenated(parts: Sequence[Totals]) -> Totals:
    return Totals(*(np.concatenate([getattr(part, name) for part in parts]) for name in Totals.__dataclass_fields__))
