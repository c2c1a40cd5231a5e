"""A plain PyTorch Retro: the rival of ``benchmarks.train_step``.

The same model as ours with its default settings (layer norm, rotary positions, exact GELU, biases, an encoder of two or more
layers whose first reads the decoder's states at the first CCA layer), as one writes it in PyTorch for speed: projections of
queries, keys and values in one product, scaled_dot_product_attention, the fused AdamW. It knows whole rows of one document and
neighbours without padding only, so it computes no masks; ours does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_jax.config import ModelConfig, OptimizerConfig
from retro_jax.data.batch import Batch


def heads(x_XTD: Tensor, count: int, stacked: int) -> tuple[Tensor, ...]:
    """[X, T, stacked * N * H] to ``stacked`` times [X, N, T, H]."""
    X, T, width = x_XTD.shape
    return x_XTD.view(X, T, stacked, count, width // (stacked * count)).permute(2, 0, 3, 1, 4).unbind(0)


def merged(o_XNTH: Tensor) -> Tensor:
    """[X, N, T, H] to [X, T, N * H]."""
    return o_XNTH.transpose(1, 2).flatten(2)


class Rotary(nn.Module):
    """Rotary positions in halves, of tables that are computed once."""

    def __init__(self, positions_T: Tensor, head_dim: int, base: float) -> None:
        super().__init__()
        inverse = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles_TF = positions_T.float()[:, None] * inverse[None]
        self.register_buffer("cos", angles_TF.cos(), persistent=False)
        self.register_buffer("sin", angles_TF.sin(), persistent=False)

    def forward(self, x_XNTH: Tensor) -> Tensor:
        a, b = x_XNTH.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1)


class SelfAttention(nn.Module):
    """Causal in the decoder, open in the encoder."""

    def __init__(self, width: int, count: int, rotary: Rotary, *, causal: bool) -> None:
        super().__init__()
        self.count, self.rotary, self.causal = count, rotary, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_XTD: Tensor) -> Tensor:
        q, k, v = heads(self.qkv(x_XTD), self.count, 3)
        return self.out(merged(F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=self.causal)))


class CrossAttention(nn.Module):
    """Queries of one stream, keys and values of another; with rotary positions of both, where they are given."""

    def __init__(self, width: int, count: int, rotary_q: Rotary | None = None, rotary_k: Rotary | None = None) -> None:
        super().__init__()
        self.count, self.rotary_q, self.rotary_k = count, rotary_q, rotary_k
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x_XQD: Tensor, context_XSD: Tensor) -> Tensor:
        (q,), (k, v) = heads(self.q(x_XQD), self.count, 1), heads(self.kv(context_XSD), self.count, 2)
        if self.rotary_q is not None and self.rotary_k is not None:
            q, k = self.rotary_q(q), self.rotary_k(k)
        return self.out(merged(F.scaled_dot_product_attention(q, k, v)))


class FeedForward(nn.Module):
    """up - GELU - down."""

    def __init__(self, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, ffn_dim), nn.Linear(ffn_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """A layer of the decoder or of the encoder; ``cross`` is its CCA, or its attention to the chunk."""

    def __init__(self, config: ModelConfig, rotary: Rotary, cross: CrossAttention | None, *, causal: bool) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.norm_cross = nn.LayerNorm(width, eps) if cross is not None else None
        self.attention = SelfAttention(width, config.num_heads, rotary, causal=causal)
        self.cross, self.ffn = cross, FeedForward(width, config.ffn_width)


class TorchRetro(nn.Module):
    """Tokens and neighbours to logits.

    Args:
        config: with a vocabulary, ``retro`` and untied embeddings; what is not named above must be at its default.
        length: tokens of a row, whole chunks.
    """

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__()
        retro, V, D, N = config.retro, config.vocab_size, config.width, config.num_heads
        H, base = config.heads_dim, config.rotary_base
        assert retro is not None and V is not None and not config.tied_embedding
        chunks = retro.chunks
        self.chunk_len, self.num_chunks, self.cca_layers = chunks.chunk_len, length // chunks.chunk_len, config.cca_layers
        place_R = torch.arange(chunks.retrieved_len)
        row, neighbour = Rotary(torch.arange(length), H, base), Rotary(place_R, H, base)
        reader = Rotary(torch.arange(chunks.chunk_len) + chunks.chunk_len - 1, H, base)
        read = Rotary(place_R.repeat(chunks.num_neighbours), H, base)

        def cca(number: int) -> CrossAttention | None:
            return CrossAttention(D, N, reader, read) if number in config.cca_layers else None

        self.embedding, self.output = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.decoder = nn.ModuleList(Layer(config, row, cca(i + 1), causal=True) for i in range(config.num_layers))
        self.encoder = nn.ModuleList(
            Layer(config, neighbour, CrossAttention(D, N) if i == 0 else None, causal=False)
            for i in range(retro.encoder.num_layers)
        )
        self.final_norm = nn.LayerNorm(D, config.norm_eps)

    def forward(self, tokens_BT: Tensor, neighbours_BLKR: Tensor) -> Tensor:
        x, encoded = self.embedding(tokens_BT), None
        for layer in self.decoder:
            x = x + layer.attention(layer.norm_attention(x))
            if layer.cross is not None:
                y = layer.norm_cross(x)
                if encoded is None:
                    encoded = self.encode(neighbours_BLKR, y)
                x = x + self.read(layer.cross, y, encoded)
            x = x + layer.ffn(layer.norm_ffn(x))
        return self.output(self.final_norm(x))

    def encode(self, neighbours_BLKR: Tensor, states_BTD: Tensor) -> Tensor:
        """[B * L, K * R, D], each neighbour given the states of its chunk."""
        B, L, K, R = neighbours_BLKR.shape
        chunks_YCD = states_BTD.reshape(B * L, self.chunk_len, -1)
        e = self.embedding(neighbours_BLKR.view(B * L * K, R))
        for layer in self.encoder:
            e = e + layer.attention(layer.norm_attention(e))
            if layer.cross is not None:
                read_YSD = layer.cross(layer.norm_cross(e).view(B * L, K * R, -1), chunks_YCD)
                e = e + read_YSD.view(B * L * K, R, -1)
            e = e + layer.ffn(layer.norm_ffn(e))
        return e.view(B * L, K * R, -1)

    def read(self, cca: CrossAttention, y_BTD: Tensor, encoded_YSD: Tensor) -> Tensor:
        """CCA: a chunk's last token and the next chunk's others read its neighbours; the row's first tokens read nothing."""
        B, T, D = y_BTD.shape
        skipped = self.chunk_len - 1
        readers = F.pad(y_BTD[:, skipped:], (0, 0, 0, skipped)).view(B * self.num_chunks, self.chunk_len, D)
        return F.pad(cca(readers, encoded_YSD).view(B, T, D)[:, : T - skipped], (0, 0, skipped, 0))


def torch_stepper(model: TorchRetro, batch: Batch, config: OptimizerConfig, *, compiled: bool = False) -> Callable[[], Any]:
    """One training step at each call: forward, backward, clipping, AdamW at a constant rate; gives the loss."""
    decayed, others = ([p for p in model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.min_learning_rate, betas=betas, eps=config.eps, fused=True)
    loss_of = torch.compile(torch_loss) if compiled else torch_loss
    tensors = as_tensors(batch)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, *tensors)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        return loss.item()

    return call


def torch_loss(model: TorchRetro, tokens_BT: Tensor, targets_BT: Tensor, neighbours_BLKR: Tensor) -> Tensor:
    """The mean cross-entropy."""
    return F.cross_entropy(model(tokens_BT, neighbours_BLKR).flatten(0, 1), targets_BT.flatten())


def as_tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and neighbours as PyTorch indexes with them."""
    tokens, targets, neighbours = (torch.from_numpy(a).long() for a in (batch.tokens, batch.targets, batch.neighbours))
    return tokens, targets, neighbours


def torch_names(config: ModelConfig, tree: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Our parameters, or their gradients (nested dicts of arrays), under the names and in the layout of :class:`TorchRetro`."""
    named = {"embedding.weight": tree["embedding"]["table"], "output.weight": tree["output"]["table"]}
    named |= _norm("final_norm", tree["final_norm"])
    number = 0
    for stack in tree["decoder"].values():
        layers = stack["group"]["layers"]
        for again in range(layers[0]["norm_ffn"]["scale"].shape[0]):
            for layer in layers.values():
                one = _mapped(layer, lambda a, again=again: a[again])
                named |= _layer(f"decoder.{number}", one, "cca")
                number += 1
    assert number == config.num_layers
    for number, layer in tree["encoder"]["layers"].items():
        named |= _layer(f"encoder.{number}", layer, "cross")
    return {name: np.asarray(a) for name, a in named.items()}


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    return {name: _mapped(leaf, function) for name, leaf in tree.items()} if isinstance(tree, Mapping) else function(tree)


def _layer(name: str, layer: Mapping[Any, Any], cross: str) -> dict[str, Any]:
    attention, ffn = layer["attention"], layer["ffn"]
    named = _linear(f"{name}.attention.qkv", attention["query"], attention["key_value"])
    named |= _linear(f"{name}.attention.out", attention["out"])
    named |= _linear(f"{name}.ffn.up", ffn["up"]) | _linear(f"{name}.ffn.down", ffn["down"])
    named |= _norm(f"{name}.norm_attention", layer["norm_attention"]) | _norm(f"{name}.norm_ffn", layer["norm_ffn"])
    if cross in layer:
        own = layer[cross]
        named |= _linear(f"{name}.cross.q", own["query"]) | _linear(f"{name}.cross.kv", own["key_value"])
        named |= _linear(f"{name}.cross.out", own["out"]) | _norm(f"{name}.norm_cross", layer[f"norm_{cross}"])
    return named


def _norm(name: str, norm: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.weight": norm["scale"], f"{name}.bias": norm["bias"]}


def _linear(name: str, *linears: Mapping[str, Any]) -> dict[str, Any]:
    """Linear maps of one input, one under the other."""
    weights, biases = [], []
    for linear in linears:
        bias = np.asarray(linear["bias"]).reshape(-1)
        weights.append(np.asarray(linear["weight"]).reshape(-1, bias.size).T)
        biases.append(bias)
    return {f"{name}.weight": np.concatenate(weights), f"{name}.bias": np.concatenate(biases)}
