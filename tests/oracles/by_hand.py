"""Megatron's Retro written out in NumPy, float64, one row, one chunk and one neighbour at a time, from its own tensors' names.

It shares no code with the model and follows the description of the original, so that fixtures of any shape can be made:
:func:`make_fixture` gives what ``np.load`` of a fixture would give, without gradients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]


def make_fixture(settings: Mapping[str, Any], params: Tensors, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs, logits and loss of a Retro (or GPT) with these ``resolved`` settings and tensors in Megatron core's names."""
    random = np.random.default_rng(seed)
    rows, length = settings["batch_size"], settings["sequence_length"]
    tokens, labels = (random.integers(0, settings["vocab_size"], (rows, length)) for _ in range(2))
    documents, positions = np.zeros(length, int), np.arange(length)
    if settings["document_reset_mask"]:
        documents = (np.arange(length) >= length // 3).astype(int) + (np.arange(length) >= length // 2)
        positions = np.concatenate([np.arange((documents == d).sum()) for d in range(3)])
    arrays = {
        "in/input_ids": tokens,
        "in/labels": labels,
        "in/loss_mask": (random.random((rows, length)) < 0.8).astype(np.float32),
        "in/position_ids": np.tile(positions, (rows, 1)),
        "in/attention_mask": ~np.tril(documents[:, None] == documents[None, :])[None, None],
    }
    if settings["retro_layers_1based"]:
        chunks = -(-length // settings["chunk_length"])
        shape = (rows * chunks * settings["num_neighbours"], settings["retrieved_length"])
        arrays["in/context_input_ids"] = random.integers(0, settings["vocab_size"], shape)
    logits = logits_by_hand(settings, params, arrays)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    mask = arrays["in/loss_mask"].astype(np.float64)
    loss = np.asarray((losses * mask).sum() / mask.sum())
    arrays |= {"f64/logits": logits, "f64/loss": loss, "out/loss": loss.astype(np.float32), "meta_json": meta_json(settings)}
    return arrays | {f"param/{name}": tensor for name, tensor in params.items()}


def meta_json(settings: Mapping[str, Any]) -> np.ndarray:
    """Settings as a fixture holds them."""
    return np.frombuffer(json.dumps({"resolved": dict(settings)}).encode(), np.uint8)


def logits_by_hand(settings: Mapping[str, Any], params: Tensors, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 [rows, n, vocabulary] of a fixture's ``in/...``."""
    tokens = inputs["in/input_ids"]
    rows, length = tokens.shape
    neighbours = inputs.get("in/context_input_ids", np.zeros((0, 1), int))
    by_row = neighbours.reshape(rows, -1, neighbours.shape[1])
    positions = np.broadcast_to(inputs["in/position_ids"], tokens.shape)
    seen = np.tril(np.ones((rows, length, length), bool))
    if settings["document_reset_mask"]:
        seen = np.broadcast_to(~inputs["in/attention_mask"].reshape(-1, length, length), seen.shape)
    return np.stack([_Row(settings, params, *row).logits() for row in zip(tokens, by_row, positions, seen, strict=True)])


class _Row:
    """One row of tokens; ``n`` of them, chunks of ``m``, the first one with ``f``."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        params: Tensors,
        tokens_n: np.ndarray,
        neighbours_Xr: np.ndarray,
        positions_n: np.ndarray,
        seen_nn: np.ndarray,
    ) -> None:
        self.settings, self.tokens, self.neighbours = settings, tokens_n, neighbours_Xr
        self.positions, self.seen = positions_n, seen_nn
        self.params = {name: np.asarray(tensor, np.float64) for name, tensor in params.items()}
        self.n, self.m = len(tokens_n), settings["chunk_length"] or 1
        self.f = (self.n - 1) % self.m + 1

    def logits(self) -> np.ndarray:
        settings, params = self.settings, self.params
        table = params["embedding.word_embeddings.weight"]
        x = table[self.tokens]
        if settings["positions"] == "learned":
            x = x + params["embedding.position_embeddings.weight"][self.positions]
        encoded: list[np.ndarray] | None = None
        for layer in range(settings["num_layers"]):
            at = f"decoder.layers.{layer}."
            rotary = settings["positions"] == "rotary"
            x = x + self.self_attention(at + "self_attention.", self.norm(at + "input_layernorm.", x), self.seen, rotary)
            if layer + 1 in settings["retro_layers_1based"]:
                h = self.norm(at + "pre_cross_attn_layernorm.", x)
                if encoded is None:
                    encoded = self.encode(at + "cross_attention.encoder.layers.", h)
                x = x + self.chunked_cross_attention(at + "cross_attention.attn.", h, encoded)
            x = x + self.feed_forward(at + "mlp.", self.norm(at + "pre_mlp_layernorm.", x))
        if settings["final_norm"]:
            x = self.norm("decoder.final_layernorm.", x)
        return x @ (table if settings["tied_embeddings"] else params["output_layer.weight"]).T

    def chunk(self, h: np.ndarray, number: int) -> np.ndarray:
        """The chunk's m rows; the first one's are filled up with zeros."""
        if number == 0:
            return np.concatenate([h[: self.f], np.zeros((self.m - self.f, h.shape[1]))])
        start = self.f + (number - 1) * self.m
        return h[start : start + self.m]

    def encode(self, at: str, h: np.ndarray) -> list[np.ndarray]:
        """Per chunk, the encoded tokens of its neighbours, one neighbour below the other."""
        settings, params = self.settings, self.params
        k, r = settings["num_neighbours"], settings["retrieved_length"]
        encoded = []
        for number in range(len(self.neighbours) // k):
            condition, found = self.chunk(h, number), []
            for neighbour in self.neighbours[number * k : (number + 1) * k]:
                e = params["embedding.word_embeddings.weight"][neighbour]
                if settings["encoder_positions"] == "learned":
                    e = e + params["embedding.position_embeddings.weight"][:r]
                for layer in range(settings["encoder_layers"]):
                    name = f"{at}{layer}."
                    everywhere = np.ones((r, r), bool)
                    e = e + self.self_attention(
                        name + "self_attention.", self.norm(name + "input_layernorm.", e), everywhere, False
                    )
                    last_norm = name + "pre_mlp_layernorm."
                    if layer == 0:
                        y = self.norm(name + "pre_cross_attn_layernorm.", e)
                        residual = y if settings["encoder_cross_attention_residual"] == "normalised" else e
                        e = residual + self.cross_attention(name + "cross_attention.attn.", y, condition)
                        last_norm += "norm."
                    e = e + self.feed_forward(name + "mlp.", self.norm(last_norm, e))
                found.append(e)
            encoded.append(np.concatenate(found))
        return encoded

    def chunked_cross_attention(self, at: str, h: np.ndarray, encoded: list[np.ndarray]) -> np.ndarray:
        """Chunk c's last token and the m - 1 tokens after it read what its neighbours say; the tokens before read nothing."""
        out = np.zeros_like(h)
        for number, states in enumerate(encoded):
            start = self.f - 1 + number * self.m
            out[start : start + self.m] = self.cross_attention(at, h[start : start + self.m], states)
        return out

    def self_attention(self, at: str, x: np.ndarray, seen: np.ndarray, rotary: bool) -> np.ndarray:
        settings = self.settings
        heads, size, groups = (
            settings["num_heads"],
            settings["head_dim"],
            settings.get("num_query_groups") or settings["num_heads"],
        )
        qkv = self.linear(at + "linear_qkv.", x).reshape(len(x), groups, heads // groups + 2, size)
        out = np.zeros((len(x), heads, size))
        for head in range(heads):
            group = head // (heads // groups)
            q, key, value = qkv[:, group, head % (heads // groups)], qkv[:, group, -2], qkv[:, group, -1]
            if rotary:
                q, key = self.rotated(q), self.rotated(key)
            out[:, head] = _softmax(np.where(seen, q @ key.T / math.sqrt(size), -np.inf)) @ value
        return self.linear(at + "linear_proj.", out.reshape(len(x), -1))

    def cross_attention(self, at: str, x: np.ndarray, states: np.ndarray) -> np.ndarray:
        heads, size = self.settings["num_heads"], self.settings["head_dim"]
        q = self.linear(at + "linear_q.", x).reshape(len(x), heads, size)
        kv = self.linear(at + "linear_kv.", states).reshape(len(states), heads, 2, size)
        out = [_softmax(q[:, i] @ kv[:, i, 0].T / math.sqrt(size)) @ kv[:, i, 1] for i in range(heads)]
        return self.linear(at + "linear_proj.", np.stack(out, axis=1).reshape(len(x), -1))

    def feed_forward(self, at: str, x: np.ndarray) -> np.ndarray:
        y = self.linear(at + "linear_fc1.", x)
        kind = self.settings["activation"]
        if kind == "swiglu":
            gate, up = np.split(y, 2, axis=-1)
            y = gate / (1 + np.exp(-gate)) * up
        elif kind == "squared_relu":
            y = np.maximum(y, 0) ** 2
        elif kind == "gelu_tanh":
            y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        else:
            y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        return self.linear(at + "linear_fc2.", y)

    def norm(self, at: str, x: np.ndarray) -> np.ndarray:
        weight = self.params[at + "weight"] + (1 if self.settings["zero_centered_gamma"] else 0)
        if self.settings["normalization"] == "RMSNorm":
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.settings["norm_epsilon"]) * weight
        centred = x - x.mean(-1, keepdims=True)
        centred = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.settings["norm_epsilon"])
        return centred * weight + self.params[at + "bias"]

    def linear(self, at: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.params[at + "weight"].T
        return y + self.params[at + "bias"] if self.settings["linear_bias"] else y

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """Rotary positions, counted through the row whatever the documents, on the first of each head's dims; tables in float32,
        as Megatron has them."""
        dims = int(x.shape[1] * self.settings["rotary_percent"])
        inverse = 1 / np.float32(self.settings["rotary_base"]) ** (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims))
        angles = np.outer(np.arange(len(x), dtype=np.float32), inverse)
        cos, sin = np.cos(angles).astype(np.float64), np.sin(angles).astype(np.float64)
        a, b, rest = x[:, : dims // 2], x[:, dims // 2 : dims], x[:, dims:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
