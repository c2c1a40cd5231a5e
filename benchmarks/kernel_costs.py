"""The operations and the fewest bytes of attention and of the loss, and the time below which no program can do them.

Bytes count every input read once and every output written once, and the float32 log-sum-exp of each query. A masked key is
not read; its gradient is written. Operations count the pairs of a query and a key that it sees, so causal attention has half.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes read and written."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, flops_a_second: float, bytes_a_second: float) -> float:
        """Seconds: the longer of computing and moving."""
        return max(self.flops / flops_a_second, self.bytes / bytes_a_second)

    def limit(self, flops_a_second: float, bytes_a_second: float) -> str:
        """Which of the two that is."""
        return "compute" if self.flops / flops_a_second > self.bytes / bytes_a_second else "memory"

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What attention works on, over all problems: queries, keys, keys that any query may see, pairs of a query and a key that it
    sees; heads of queries and of keys, their width, and bytes a number."""

    queries: int
    keys: int
    valid_keys: int
    pairs: int
    heads: int
    groups: int
    width: int
    itemsize: int


def attention_forward(a: Attended) -> Cost:
    """4 operations a pair and number; Q, K, V read, O and the log-sum-exp written."""
    numbers = 2 * a.queries * a.heads + 2 * a.valid_keys * a.groups
    return Cost(4 * a.pairs * a.heads * a.width, numbers * a.width * a.itemsize + 4 * a.queries * a.heads)


def attention_backward(a: Attended) -> Cost:
    """10 operations a pair and number; Q, K, V, O, dO, the log-sum-exp and rowsum(O dO) read, dQ, dK, dV written."""
    numbers = 4 * a.queries * a.heads + 2 * (a.valid_keys + a.keys) * a.groups
    return Cost(10 * a.pairs * a.heads * a.width, numbers * a.width * a.itemsize + 8 * a.queries * a.heads)


def loss_forward(tokens: int, width: int, vocab: int, itemsize: int) -> Cost:
    """One product; hidden states, table, targets and weights read."""
    return Cost(2 * tokens * width * vocab, itemsize * (tokens + vocab) * width + 8 * tokens)


def loss_backward(tokens: int, width: int, vocab: int, itemsize: int) -> Cost:
    """Two products, the logits' gradient computed in passing; gradients of hidden states and table written."""
    return Cost(4 * tokens * width * vocab, itemsize * (tokens + vocab) * width)
