"""The activation memory and operations of a GPT layer as published (Korthikanti et al. 2022, Reducing Activation Recomputation in
Large Transformer Models), in exact integers.

Symbols are the paper's: s tokens of a row, b rows of a microbatch, h width, a heads, L layers, v vocabulary; t devices along
tensor, p pipeline stages, m interleaved parts of a stage. Activations have 16 bits, dropout masks one byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from retro_jax.config.checks import check, check_positive

PaperPolicy = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class PaperModel:
    """A row of the paper's Table 3; ``batch`` is the rows of a step."""

    heads: int
    width: int
    layers: int
    tensor: int = 8
    stages: int = 1
    interleave: int = 1
    microbatch: int = 1
    batch: int
    seq_len: int = 2048
    vocab: int = 51200

    def __post_init__(self) -> None:
        check_positive(
            self, "heads", "width", "layers", "tensor", "stages", "interleave", "microbatch", "batch", "seq_len", "vocab"
        )
        for name in ("heads", "seq_len", "vocab"):
            check(
                getattr(self, name) % self.tensor == 0, f"{name}={getattr(self, name)} is not divisible by tensor={self.tensor}"
            )
        parts = self.stages * self.interleave
        check(self.layers % parts == 0, f"layers={self.layers} are not divisible by stages * interleave = {parts}")

    @property
    def sbh(self) -> int:
        """Numbers of one array of the width."""
        return self.seq_len * self.microbatch * self.width

    @property
    def aasb(self) -> int:
        """Numbers of the attention weights of all heads, a s^2 b."""
        return self.heads * self.seq_len**2 * self.microbatch


MODELS = {
    "22B": PaperModel(heads=64, width=6144, layers=48, microbatch=4, batch=4),
    "175B": PaperModel(heads=96, width=12288, layers=96, stages=8, interleave=3, batch=64),
    "530B": PaperModel(heads=128, width=20480, layers=105, stages=35, interleave=3, batch=280),
    "1T": PaperModel(heads=160, width=25600, layers=128, stages=64, batch=512),
}


class Term(NamedTuple):
    """One array that a layer keeps: its part, its name, bytes without any parallelism, whether tensor parallelism alone divides
    it, and whether selective recomputation computes it again."""

    part: Literal["attention", "mlp", "norms"]
    name: str
    size: int
    divided: bool
    selective: bool = False


def terms(model: PaperModel) -> list[Term]:
    """Section 4.1, array by array: attention 11sbh + 5as^2b, MLP 19sbh, norms 4sbh, in all sbh(34 + 5as/h) (equation 1)."""
    n, weights = model.sbh, model.aasb
    return [
        Term("attention", "input of query, key and value", 2 * n, False),
        Term("attention", "query and key", 4 * n, True),
        Term("attention", "softmax", 2 * weights, True, True),
        Term("attention", "mask of the softmax's dropout", weights, True, True),
        Term("attention", "dropped weights", 2 * weights, True, True),
        Term("attention", "value", 2 * n, True),
        Term("attention", "input of the projection", 2 * n, True),
        Term("attention", "mask of the dropout", n, False),
        Term("mlp", "input", 2 * n, False),
        Term("mlp", "input of GELU", 8 * n, True),
        Term("mlp", "input of the second product", 8 * n, True),
        Term("mlp", "mask of the dropout", n, False),
        Term("norms", "input of the first", 2 * n, False),
        Term("norms", "input of the second", 2 * n, False),
    ]


def layer_bytes(model: PaperModel, *, sequence: bool, policy: PaperPolicy) -> int:
    """What one layer keeps on each of t devices: Table 2.

    Args:
        sequence: sequence parallelism divides what tensor parallelism alone leaves whole (equations 2 and 4).
        policy: "full" keeps the layer's input, whole on every device: 2sbh.
    """
    if policy == "full":
        return 2 * model.sbh
    kept = [term for term in terms(model) if not (policy == "selective" and term.selective)]
    return sum(term.size // model.tensor if term.divided or sequence else term.size for term in kept)


def extra_bytes(model: PaperModel) -> int:
    """Beside the layers, on the first stage (section 4.3): masks of the embedding's dropout of the p microbatches in flight;
    without a pipeline also the final norm's and the output layer's input and the logits in float32."""
    masks = model.sbh * model.stages // model.tensor
    if model.stages > 1:
        return masks
    logits = 4 * model.seq_len * model.microbatch * model.vocab
    return masks + (4 * model.sbh + logits) // model.tensor


def stage_bytes(model: PaperModel, *, sequence: bool, policy: PaperPolicy) -> int:
    """What the layers of the first stage keep, whose p microbatches in flight are as much as all L layers of one; interleaving
    adds (p - 1) / (p m) of it (equations 5 and 6)."""
    in_flight = model.layers + model.layers // (model.stages * model.interleave) * (model.stages - 1) * (model.interleave > 1)
    return in_flight * layer_bytes(model, sequence=sequence, policy=policy)


def model_flops(model: PaperModel) -> int:
    """Of a step, forward and backward: 72 B L s h^2 (1 + s / 6h + v / 12hL) (equation 7)."""
    rows, s, h = model.batch, model.seq_len, model.width
    return 72 * rows * model.layers * s * h**2 + 12 * rows * model.layers * s**2 * h + 6 * rows * s * h * model.vocab


def selective_flops(model: PaperModel) -> int:
    """With selective recomputation: 72 B L s h^2 (1 + s / 3h + v / 12hL) (equation 8); by :func:`model_flops` about 1 + s / 6h
    (equation 9)."""
    return model_flops(model) + 12 * model.batch * model.layers * model.seq_len**2 * model.width


def full_flops(model: PaperModel) -> int:
    """With all of a layer's forward pass computed again: 24 B L s h^2 (1 + s / 6h) more."""
    rows, s, h = model.batch, model.seq_len, model.width
    return model_flops(model) + 24 * rows * model.layers * s * h**2 + 4 * rows * model.layers * s**2 * h
