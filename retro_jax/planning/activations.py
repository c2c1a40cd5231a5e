"""What a layer of ours keeps for its backward pass, by name: bytes of one device, in exact integers.

Names are those of :mod:`retro_jax.config.recompute`; under the policy "none" further arrays are kept, which have no name there
because every other policy computes them again. Tests hold the sums against the traced program.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from retro_jax.config import Config, ModelConfig, Recompute
from retro_jax.config.recompute import Action
from retro_jax.model.attention import BlockShape
from retro_jax.model.encoder import encoder_shape

LayerKind = Literal["plain", "cca", "conditioned encoder", "encoder"]
ENCODER: tuple[LayerKind, LayerKind] = ("conditioned encoder", "encoder")
LSE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one device has of a batch: rows, their tokens here and in all, chunks with ``neighbours`` of ``retrieved_len`` tokens
    each; and with how many devices along ``tensor``, ``sequence`` and ``fsdp`` it shares the work."""

    rows: int
    tokens: int
    chunks: int = 0
    neighbours: int = 0
    retrieved_len: int = 0
    tensor: int = 1
    sequence: int = 1
    fsdp: int = 1
    number_bytes: int = 2
    dropout: bool = False


class Kept(NamedTuple):
    """An array of a layer: its name, bytes, and what the policy does with it. What is computed again takes none meanwhile."""

    name: str
    size: int
    action: Action


def kinds(model: ModelConfig) -> list[LayerKind]:
    """The kinds of layers that a model has."""
    found: list[LayerKind] = ["plain"] if len(model.cca_layers) < model.num_layers else []
    if model.retro is None or model.retro.gate == 0.0:
        return found or ["plain"]
    encoder = model.retro.encoder
    conditioned = 1 if encoder.conditioning == "decoder" and encoder.num_layers else 0
    found.append("cca")
    if conditioned:
        found.append("conditioned encoder")
    if encoder.num_layers > conditioned:
        found.append("encoder")
    return found


def saved_by_layer(config: Config, model: ModelConfig, *, by_chunks: bool = False) -> dict[LayerKind, list[Kept]]:
    """:func:`layer_arrays` of each kind in a step of a config: on one device, of one of the parts that a batch is dealt to;
    empty for the reference implementation, which is not counted.

    Args:
        config: batch, rows, precision and mesh.
        model: with ``vocab_size``.
        by_chunks: how the devices along ``tensor`` share the encoder.
    """
    if model.implementation == "reference":
        return {}
    mesh, data, retro = config.mesh, config.data, model.retro
    rates = [model.dropout, model.attention_dropout]
    rates += [] if retro is None else [retro.encoder.dropout, retro.encoder.attention_dropout]
    place = Place(
        rows=data.batch_size // (mesh.data * mesh.fsdp * config.training.accumulate),
        tokens=data.seq_len // mesh.sequence,
        chunks=data.seq_len // (mesh.sequence * config.chunks.chunk_len),
        neighbours=config.chunks.num_neighbours,
        retrieved_len=config.chunks.retrieved_len,
        tensor=mesh.tensor,
        sequence=mesh.sequence,
        fsdp=mesh.fsdp if mesh.fsdp_gather == "layer" else 1,
        number_bytes=4 if config.training.precision == "float32" else 2,
        dropout=any(rates),
    )
    alone = dataclasses.replace(place, tensor=1, chunks=place.chunks // mesh.tensor) if by_chunks else place
    return {kind: layer_arrays(model, kind, alone if kind in ENCODER else place) for kind in kinds(model)}


def layer_arrays(model: ModelConfig, kind: LayerKind, place: Place) -> list[Kept]:
    """All arrays of a layer that its backward pass reads, in the order of the forward pass.

    The first CCA layer runs in two parts, around the encoder; what is between them, ``after_attention``, it keeps on the device
    under every policy. Tables of rotary positions are counted a layer; a scanned stack holds them once.

    Args:
        model: its ``recompute`` and ``recompute_names`` say what is kept.
        kind: "plain" and "cca" of the decoder.
        place: what the device has.
    """
    layer = _Layer(model, kind, place)
    layer.add("stream", layer.own * layer.shape.width, action="save")
    layer.attention()
    if kind == "cca":
        layer.cca()
    if kind == "conditioned encoder":
        layer.cross()
    layer.feed_forward()
    return layer.arrays


def saved_bytes(arrays: list[Kept], action: Action = "save") -> int:
    """Bytes of what is saved on the device, or offloaded to the host."""
    return sum(array.size for array in arrays if array.action == action)


class _Layer:
    """Collects the arrays of one layer."""

    def __init__(self, model: ModelConfig, kind: LayerKind, place: Place) -> None:
        if model.implementation == "reference":
            raise ValueError("ModelConfig.implementation='reference' keeps what JAX asks for, which is not counted; use 'xla'")
        self.model, self.place, self.arrays = model, place, list[Kept]()
        self.decoder = kind not in ENCODER
        self.shape = BlockShape.of_decoder(model) if self.decoder else encoder_shape(model)
        self.recompute: Recompute = self.shape.recompute
        self.everything = self.recompute.actions is None
        self.heads = self.shape.num_heads // place.tensor
        self.groups = max(1, self.shape.kv_heads // place.tensor)
        # Problems of attention, and tokens of each.
        self.problems = place.rows if self.decoder else place.rows * place.chunks * place.neighbours
        self.length = place.tokens if self.decoder else place.retrieved_len
        self.all_tokens = self.problems * self.length
        self.own = self.all_tokens // place.tensor

    def add(self, name: str, numbers: int, *, size: int | None = None, action: Action | None = None) -> None:
        """An array of so many numbers, of ``size`` bytes each."""
        each = self.place.number_bytes if size is None else size
        self.arrays.append(Kept(name, numbers * each, self.recompute.action(name) if action is None else action))

    def also(self, name: str, numbers: int, *, size: int | None = None) -> None:
        """An array that the policy "none" alone keeps."""
        if self.everything and numbers:
            self.add(name, numbers, size=size, action="save")

    def read(self, part: str) -> None:
        """The normed stream as a sub-layer reads it: this device's share of the tokens, or all of them where those are kept."""
        gathered = self.recompute.action(f"{part}_gathered")
        own: Action = self.recompute.action(f"{part}_in") if gathered == "recompute" else "recompute"
        self.add(f"{part}_in", self.own * self.shape.width, action=own)
        self.add(f"{part}_gathered", self.all_tokens * self.shape.width, action=gathered)

    def operands(self, part: str, keys: int, *, row_keys: int | None = None, queries: int | None = None) -> None:
        """Queries, keys, values, result and log-sum-exp. ``keys``: of all problems, on this device; ``row_keys``: of the whole
        rows, which the policy "none" keeps; ``queries``: as attention sees them."""
        H, queries = self.shape.head_dim, self.all_tokens if queries is None else queries
        keys = row_keys if row_keys is not None and self.everything else keys
        self.add(f"{part}_query", (queries if self.everything else self.all_tokens) * self.heads * H)
        self.add(f"{part}_key", keys * self.groups * H)
        self.add(f"{part}_value", keys * self.groups * H)
        self.add(f"{part}_out", queries * self.heads * H)
        self.add(f"{part}_lse", queries * self.heads, size=LSE_BYTES)
        self.also(f"{part}_out as the projection reads it", self.all_tokens * self.heads * H)

    def rotary(self, part: str, *positions: int) -> None:
        """Cosines and sines of so many positions."""
        rotated = int(self.shape.head_dim * self.shape.rotary_fraction) // 2
        self.also(f"{part}_tables", sum(2 * count * rotated for count in positions))

    def weights_mask(self, part: str, weights: int, rate: float) -> None:
        if self.place.dropout and rate:
            self.also(f"{part}_weights dropped", weights, size=1)

    def stream_mask(self, part: str) -> None:
        if self.place.dropout and self.shape.dropout:
            self.also(f"{part} dropped", self.own * self.shape.width, size=1)

    def attention(self) -> None:
        place, parts = self.place, self.place.sequence if self.decoder else 1
        self.read("attention")
        if self.shape.positions == "rotary":
            count = self.all_tokens if self.decoder else self.length
            self.rotary("attention", count, count)
        self.operands("attention", self.all_tokens, row_keys=self.all_tokens * parts)
        weights = self.all_tokens * self.heads * self.length * parts
        self.weights_mask("attention", weights, self.shape.attention_dropout)
        self.stream_mask("attention")
        self.add("after_attention", self.all_tokens // place.tensor * self.shape.width)

    def cca(self) -> None:
        place, retro, width = self.place, self.model.retro, self.shape.width
        assert retro is not None
        C, chunks = retro.chunks.chunk_len, place.rows * (place.chunks + (place.sequence > 1))
        keys_a_chunk = place.neighbours * place.retrieved_len
        keys, queries = chunks * keys_a_chunk, chunks * C
        encoded_width, reach = encoder_shape(self.model).width, retro.conv_width - 1
        self.read("cca")
        if reach and place.tensor == place.fsdp == 1:
            before = place.rows * reach
            self.also("cca_query mixed", (self.all_tokens + before) * width)
            self.also("cca_query before", before, size=4)
            self.also("cca_key mixed", (2 * keys + chunks * place.neighbours) * encoded_width)
        if retro.cca_positions == "rotary":
            self.rotary("cca", self.length, place.retrieved_len)
        self.operands("cca", keys, queries=queries)
        self.also("cca_mask", keys, size=1)
        self.also("cca_null", self.heads if retro.null_key is not None else 0)
        self.weights_mask("cca", queries * self.heads * keys_a_chunk, self.shape.attention_dropout)
        self.stream_mask("cca")
        self.also("cca_gated", self.own * width if retro.gate == "learned" else 0)
        self.also("cca_reads", self.own, size=1)
        self.add("after_cca", self.own * width)

    def cross(self) -> None:
        retro, place = self.model.retro, self.place
        assert retro is not None
        C = retro.chunks.chunk_len
        self.read("cross")
        self.operands("cross", place.rows * place.chunks * C)
        self.weights_mask("cross", self.all_tokens * self.heads * C, self.model.attention_dropout)
        self.stream_mask("cross")
        self.add("after_cca", self.own * self.shape.width)

    def feed_forward(self) -> None:
        F = self.shape.ffn_dim // self.place.tensor
        self.read("ffn")
        self.add("ffn_up", self.all_tokens * F * (2 if self.shape.activation == "swiglu" else 1))
        self.also("ffn_active", self.all_tokens * F)
        self.stream_mask("ffn")
