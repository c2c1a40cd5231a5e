"""How the devices along ``tensor`` share the neighbour encoder: heads and columns as in the decoder, or chunks.

By heads, a layer exchanges the tokens of all neighbours at each sub-layer. By chunks, each device encodes whole neighbours alone,
and a layer exchanges its weights: they are held divided, gathered where they are used, forward and backward, and their gradients
come back as sums of each shard. Which is less depends on how many tokens the devices share, not on how many devices there are.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import jax
from flax import nnx

from retro_jax.data.batch import Batch
from retro_jax.model.encoder import EncoderLayer, NeighbourEncoder
from retro_jax.parallel.axes import OVER_TENSOR, TENSOR, axis_size


class Received(NamedTuple):
    """Bytes that reach a device in either division."""

    heads: int
    chunks: int


def encodes_own_chunks(encoder: NeighbourEncoder, batch: Batch, normed_BTD: jax.Array) -> bool:
    """Whether each device along ``tensor`` encodes the neighbours of its own chunks, as ``EncoderConfig.division`` says.

    Args:
        encoder: with the parameters that this device holds.
        batch: this device's part.
        normed_BTD: the states that condition the encoder, this device's share of the tokens.

    Raises:
        ValueError: what it says cannot be done.
    """
    devices, division = axis_size(TENSOR), encoder.config.division
    if devices == 1:
        return False
    (L, _, R), on_grid = batch.neighbours.shape[1:], batch.first_chunk_len is None
    by_chunks, by_heads = L % devices == 0 and on_grid, R % devices == 0
    if division == "chunks" and not by_chunks:
        reason = f"a row's {L} chunks" if on_grid else "rows with a first_chunk_len of their own"
        raise ValueError(
            f"EncoderConfig.division='chunks' cannot share {reason} among MeshConfig.tensor={devices} devices; "
            "change DataConfig.seq_len or the mesh, or use 'heads'"
        )
    if not by_heads and (division == "heads" or not by_chunks):
        raise ValueError(f"ChunkConfig.retrieved_len={R} is not a multiple of MeshConfig.tensor={devices}; change one of them")
    if division == "auto" and by_chunks and by_heads:
        received = layers_receive(encoder, batch.neighbours.size, normed_BTD.size * devices)
        return received.chunks < received.heads
    return by_chunks and division != "heads"


def layers_receive(encoder: NeighbourEncoder, tokens: int, states: int) -> Received:
    """Bytes that reach a device along ``tensor`` in a forward and backward pass through the encoder's layers.

    By heads: a sub-layer gathers the tokens and sums its result into shares; backwards it gathers the result's gradient, sums the
    input's, and gathers the input again where that is not saved whole. A layer that is computed again sums all but its last
    result once more. The decoder's states are gathered once, and their gradient summed. By chunks: a weight is gathered forward
    and backward, and its gradient summed; a bias is gathered backward only where the layer is computed again. With t devices a
    device receives (t - 1) / t of each array.

    Not counted: what both exchange alike, embedding and encoded neighbours; what single exceptions of
    ``ModelConfig.recompute_names`` compute again.

    Args:
        encoder: with the parameters that this device holds.
        tokens: of all neighbours that the devices along ``tensor`` share.
        states: numbers in the decoder's states of the same rows.
    """
    devices, heads, chunks = axis_size(TENSOR), 2 * states * encoder.reads_chunks, 0
    for layer in encoder.layers:
        heads += tokens * layer.norm_ffn.scale.whole[0] * _exchanges_of_tokens(layer)
        computed_again = layer.recompute.action("after_attention") == "recompute"
        for path, param in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
            sizes = zip(param.dims, param.shape, param.whole, strict=True)
            if any(name in OVER_TENSOR and here != whole for name, here, whole in sizes):
                chunks += prod(param.whole) * (3 if computed_again or path[-1] == "weight" else 2)
    itemsize = encoder.layers[0].norm_ffn.scale.dtype.itemsize if encoder.layers else 0
    return Received(*(itemsize * numbers * (devices - 1) // devices for numbers in (heads, chunks)))


def _exchanges_of_tokens(layer: EncoderLayer) -> int:
    """How often all tokens are gathered or summed into shares in a forward and backward pass."""
    parts = ["attention", "ffn", *(["cross"] if layer.cross is not None else [])]
    again = [*(f"{part}_gathered" for part in parts), "after_attention", *(["after_cca"] if layer.cross is not None else [])]
    return 4 * len(parts) + sum(layer.recompute.action(name) == "recompute" for name in again)
