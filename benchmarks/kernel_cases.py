"""The shapes at which the kernels are timed, in the order of their worth, and random inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_costs import Attended, Cost, attention_backward, attention_forward, loss_backward, loss_forward

FORWARD, BOTH = "forward", "forward + backward"
PASSES = (FORWARD, BOTH)
Shape = tuple[int, ...]


class Case(Protocol):
    """An operation at a shape."""

    operation: ClassVar[str]

    @property
    def name(self) -> str:
        """For the table."""

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the inputs that have gradients."""

    @property
    def scales(self) -> tuple[float, ...]:
        """Their standard deviations."""

    @property
    def output(self) -> Shape:
        """Shape of the result."""

    def given(self) -> dict[str, np.ndarray]:
        """The inputs without gradients."""

    def costs(self, itemsize: int) -> dict[str, Cost]:
        """By pass."""


class Problem(NamedTuple):
    """Random inputs with gradients, those without, and the cotangent of the result."""

    arrays: tuple[Any, ...]
    given: dict[str, Any]
    cotangent: Any


@dataclass(frozen=True, kw_only=True)
class CcaCase:
    """Chunked cross-attention of rows of chunks. ``absent``: half of the neighbours' tokens are not there; a neighbour has none
    of its tokens, its first half or all with odds 1:2:1, and no chunk is without any."""

    operation: ClassVar[str] = "chunked_cross_attention"
    rows: int
    chunks: int
    heads: int
    groups: int
    width: int
    neighbours: int = 2
    absent: bool = False
    chunk_len: int = 64
    retrieved_len: int = 128

    @property
    def keys(self) -> int:
        """Of a chunk."""
        return self.neighbours * self.retrieved_len

    @property
    def name(self) -> str:
        """For the table."""
        grouped = f", {self.groups} key heads" if self.groups < self.heads else ""
        absent = ", half absent" if self.absent else ""
        return f"CCA {self.rows * self.chunks} chunks, k {self.neighbours}, {self.heads}x{self.width}{grouped}{absent}"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """q [B, T, N, H]; k and v [B, L, S, G, H]."""
        keys = (self.rows, self.chunks, self.keys, self.groups, self.width)
        return (self.output, keys, keys)

    @property
    def scales(self) -> tuple[float, ...]:
        """Of normalised queries, keys and values."""
        return (1.0, 1.0, 1.0)

    @property
    def output(self) -> Shape:
        """[B, T, N, H]."""
        return (self.rows, self.chunks * self.chunk_len, self.heads, self.width)

    def given(self) -> dict[str, np.ndarray]:
        """``valid`` bool [B, L, S]."""
        shape = (self.rows, self.chunks, self.neighbours)
        if not self.absent:
            return {"valid": np.ones((self.rows, self.chunks, self.keys), bool)}
        parts_BLK = np.random.default_rng(0).choice(3, shape, p=(0.25, 0.5, 0.25))
        parts_BLK[:, :, 0] = np.where(parts_BLK.any(-1), parts_BLK[:, :, 0], 1)
        half = self.retrieved_len // 2
        valid_BLKR = np.arange(self.retrieved_len) < parts_BLK[..., None] * half
        return {"valid": valid_BLKR.reshape(self.rows, self.chunks, self.keys)}

    def costs(self, itemsize: int) -> dict[str, Cost]:
        """The last chunk of a row is read by its last token alone."""
        valid_BL = self.given()["valid"].sum(-1)
        readers_L = np.full(self.chunks, self.chunk_len)
        readers_L[-1] = 1
        return _both(
            Attended(
                queries=self.rows * self.chunks * self.chunk_len,
                keys=self.rows * self.chunks * self.keys,
                valid_keys=int(valid_BL.sum()),
                pairs=int((valid_BL * readers_L).sum()),
                heads=self.heads,
                groups=self.groups,
                width=self.width,
                itemsize=itemsize,
            )
        )


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Attention of ``problems`` of so many queries and keys. ``mask``: "none"; "lengths", half of the problems with half of their
    keys; "causal", the row being ``segments`` documents of equal length."""

    operation: ClassVar[str] = "attention"
    label: str
    problems: int
    queries: int
    keys: int
    heads: int
    groups: int
    width: int
    mask: str = "none"
    segments: int = 1

    @property
    def name(self) -> str:
        """For the table."""
        sizes = f"{self.problems}x{self.queries}" + (f" on {self.keys}" if self.keys != self.queries else "")
        grouped = f", {self.groups} key heads" if self.groups < self.heads else ""
        lengths = ", with lengths" if self.mask == "lengths" else ""
        segments = f", {self.segments} documents" if self.segments > 1 else ""
        return f"{self.label} {sizes}, {self.heads}x{self.width}{grouped}{lengths}{segments}"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """q [X, Q, N, H]; k and v [X, S, G, H]."""
        keys = (self.problems, self.keys, self.groups, self.width)
        return (self.output, keys, keys)

    @property
    def scales(self) -> tuple[float, ...]:
        """Of normalised queries, keys and values."""
        return (1.0, 1.0, 1.0)

    @property
    def output(self) -> Shape:
        """[X, Q, N, H]."""
        return (self.problems, self.queries, self.heads, self.width)

    def given(self) -> dict[str, np.ndarray]:
        """``lengths`` int32 [X] of keys, or ``segments`` int32 [X, Q]."""
        if self.mask == "lengths":
            short = np.random.default_rng(0).permutation(self.problems) < self.problems // 2
            return {"lengths": np.where(short, self.keys // 2, self.keys).astype(np.int32)}
        if self.mask == "causal":
            segment_Q = 1 + np.arange(self.queries, dtype=np.int32) * self.segments // self.queries
            return {"segments": np.tile(segment_Q, (self.problems, 1))}
        return {}

    def costs(self, itemsize: int) -> dict[str, Cost]:
        """By the pairs that the mask leaves."""
        valid = self.problems * self.keys
        pairs = valid * self.queries
        if self.mask == "lengths":
            valid = int(self.given()["lengths"].sum())
            pairs = valid * self.queries
        if self.mask == "causal":
            lengths = np.unique(self.given()["segments"][0], return_counts=True)[1].astype(np.int64)
            pairs = self.problems * int((lengths * (lengths + 1) // 2).sum())
        return _both(
            Attended(
                queries=self.problems * self.queries,
                keys=self.problems * self.keys,
                valid_keys=valid,
                pairs=pairs,
                heads=self.heads,
                groups=self.groups,
                width=self.width,
                itemsize=itemsize,
            )
        )


@dataclass(frozen=True, kw_only=True)
class LossCase:
    """The weighted sum of cross-entropies of linear logits."""

    operation: ClassVar[str] = "linear_cross_entropy"
    tokens: int
    width: int
    vocab: int

    @property
    def name(self) -> str:
        """For the table."""
        return f"loss {self.tokens} tokens, {self.width} wide, {self.vocab} words"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """hidden [N, D], table [V, D]."""
        return ((self.tokens, self.width), (self.vocab, self.width))

    @property
    def scales(self) -> tuple[float, ...]:
        """So that logits are of the order of 1."""
        return (1.0, self.width**-0.5)

    @property
    def output(self) -> Shape:
        """A scalar, float32."""
        return ()

    def given(self) -> dict[str, np.ndarray]:
        """``targets`` int32 [N] and ``weights`` float32 [N]."""
        random = np.random.default_rng(0)
        return {
            "targets": random.integers(0, self.vocab, self.tokens, np.int32),
            "weights": random.random(self.tokens, np.float32) / self.tokens,
        }

    def costs(self, itemsize: int) -> dict[str, Cost]:
        """By pass."""
        sizes = self.tokens, self.width, self.vocab, itemsize
        return {FORWARD: loss_forward(*sizes), BOTH: loss_forward(*sizes) + loss_backward(*sizes)}


def _both(attended: Attended) -> dict[str, Cost]:
    forward = attention_forward(attended)
    return {FORWARD: forward, BOTH: forward + attention_backward(attended)}


def jax_problem(case: Case, number: int, dtype: Any) -> Problem:
    """The ``number``-th set of random inputs; the cotangent of a scalar is 1."""
    keys = jax.random.split(jax.random.key(number), len(case.shapes) + 1)
    arrays = tuple(
        scale * jax.random.normal(key, shape, dtype)
        for key, shape, scale in zip(keys[1:], case.shapes, map(jnp.dtype(dtype).type, case.scales), strict=True)
    )
    cotangent = jax.random.normal(keys[0], case.output, dtype) if case.output else jnp.float32(1.0)
    return Problem(arrays, {name: jnp.asarray(a) for name, a in case.given().items()}, cotangent)


def cca(chunks: int, neighbours: int, heads: int, width: int, groups: int | None = None, absent: bool = False) -> CcaCase:
    """Rows of 32 chunks: 2,048 tokens."""
    return CcaCase(
        rows=max(1, chunks // 32), chunks=min(chunks, 32), neighbours=neighbours, heads=heads, groups=groups or heads,
        width=width, absent=absent,
    )  # fmt: skip


def encoder(problems: int, heads: int, width: int, mask: str = "lengths") -> AttentionCase:
    """Self-attention of retrieved neighbours, 128 tokens each."""
    return AttentionCase(
        label="encoder", problems=problems, queries=128, keys=128, heads=heads, groups=heads, width=width, mask=mask
    )


def conditioning(problems: int, neighbours: int, heads: int, width: int) -> AttentionCase:
    """The encoder's cross-attention: a chunk's neighbours on the chunk's 64 tokens."""
    queries = 128 * neighbours
    return AttentionCase(
        label="conditioning", problems=problems, queries=queries, keys=64, heads=heads, groups=heads, width=width
    )


def causal(problems: int, length: int, heads: int, width: int, groups: int | None = None, segments: int = 1) -> AttentionCase:
    """The decoder's self-attention."""
    return AttentionCase(
        label="decoder", problems=problems, queries=length, keys=length, heads=heads, groups=groups or heads, width=width,
        mask="causal", segments=segments,
    )  # fmt: skip


def loss(tokens: int, width: int, vocab: int) -> LossCase:
    """The output layer."""
    return LossCase(tokens=tokens, width=width, vocab=vocab)


GPU_CASES: tuple[Case, ...] = (
    cca(256, 2, 16, 128), cca(1024, 2, 8, 64), loss(16384, 2048, 128256), encoder(2048, 16, 64), causal(8, 2048, 16, 128),
    cca(256, 2, 16, 128, absent=True), cca(256, 2, 16, 128, groups=4), conditioning(1024, 2, 16, 64),
    cca(1024, 2, 16, 128), cca(32, 2, 16, 128), loss(8192, 2048, 50304), causal(4, 4096, 16, 128), causal(4, 4096, 16, 64),
    cca(256, 1, 16, 128), cca(256, 4, 16, 128), cca(256, 8, 16, 128), encoder(512, 16, 64), encoder(8192, 8, 64),
    causal(4, 4096, 16, 128, groups=4), causal(4, 4096, 16, 128, segments=4), loss(16384, 4096, 131072),
    cca(256, 2, 8, 64), cca(32, 2, 8, 64), cca(1024, 2, 8, 64, groups=2, absent=True),
    cca(256, 4, 16, 128, groups=4, absent=True),
    causal(2, 8192, 16, 128), causal(8, 2048, 16, 64), encoder(2048, 16, 128, mask="none"), loss(32768, 2560, 128256),
    loss(16384, 2048, 256000), conditioning(256, 4, 16, 128),
)  # fmt: skip

CPU_CASES: tuple[Case, ...] = (
    cca(32, 2, 8, 64), encoder(64, 8, 64), causal(1, 1024, 8, 64), conditioning(32, 2, 8, 64), cca(32, 2, 8, 64, absent=True),
    loss(256, 512, 32000), cca(32, 2, 8, 64, groups=2), causal(1, 2048, 8, 64),
)  # fmt: skip

# Small enough to be computed in float64 too.
CHECK_CASES: tuple[Case, ...] = (
    CcaCase(rows=2, chunks=2, heads=4, groups=2, width=64, absent=True),
    CcaCase(rows=1, chunks=2, heads=2, groups=2, width=128, neighbours=3),
    AttentionCase(label="encoder", problems=4, queries=128, keys=128, heads=2, groups=2, width=64, mask="lengths"),
    AttentionCase(label="conditioning", problems=2, queries=256, keys=64, heads=2, groups=2, width=128),
    AttentionCase(label="decoder", problems=2, queries=384, keys=384, heads=4, groups=2, width=64, mask="causal", segments=3),
    LossCase(tokens=384, width=256, vocab=2500),
)
