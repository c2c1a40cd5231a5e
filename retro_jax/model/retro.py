"""The whole model: a decoder that reads retrieved neighbours through chunked cross-attention, or its plain GPT twin."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import ModelConfig
from retro_jax.data.batch import Batch
from retro_jax.model.attention import causal_mask
from retro_jax.model.cca import Neighbours
from retro_jax.model.decoder import DecoderLayer, Row, Stack, key_for, runs
from retro_jax.model.encoder import NeighbourEncoder
from retro_jax.model.grid import chunk_tokens, in_chunks, reads
from retro_jax.model.layers import Embedding, NormLayer, dropout, normal, split_key


class Retro(nnx.Module):
    """A decoder of GPT or Llama form, with the retrieval path of RETRO where ``config.retro`` is given.

    Parameters are float32; the model computes in the dtype of the parameters that it is called with.

    Args:
        config: with ``vocab_size`` set (:func:`with_vocab`).
        key: seeds the parameters.
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array) -> None:
        if config.vocab_size is None:
            raise ValueError("ModelConfig.vocab_size is None; set it, or take the tokenizer's with retro_jax.model.with_vocab")
        keys = jax.random.split(key, 6)
        self.config = config
        init, V, D = normal(config.init_std), config.vocab_size, config.width
        learned = config.positions == "learned"
        self.embedding = Embedding("vocab width", V, D, init=init, key=keys[0])
        self.position = Embedding("position width", config.max_positions, D, init=init, key=keys[1]) if learned else None
        parts = runs(config.num_layers, config.cca_layers)
        part_keys = jax.random.split(keys[2], len(parts))
        stacks = (Stack(config, pattern, count, key=k) for (pattern, count), k in zip(parts, part_keys, strict=True))
        self.decoder = nnx.List(stacks)
        self.encoder = NeighbourEncoder(config, key=keys[3]) if config.retro is not None else None
        self.final_norm = NormLayer(config.norm, config.width, config.norm_eps, key=keys[4]) if config.final_norm else None
        self.output = None if config.tied_embedding else Embedding("vocab width", V, D, init=init, key=keys[5])

    def __call__(self, batch: Batch, *, retrieval: bool = True, dropout_key: jax.Array | None = None) -> jax.Array:
        """Hidden states [B, T, D] from which the next token is predicted: logits = hidden @ output_table.T.

        Args:
            batch: rows and their neighbours.
            retrieval: False leaves the retrieval path out, as if every neighbour were absent.
            dropout_key: seeds dropout and neighbour dropout; None: neither.

        Raises:
            ValueError: rows longer than the position table, or off the grid without ``first_chunk_len``.
        """
        self._check(batch)
        batch = jax.tree.map(jnp.asarray, batch)
        x_BTD = dropout(self._embed(batch.tokens, batch.positions), self.config.dropout, key_for(dropout_key, 0))
        row = Row(causal_mask(batch.segments), batch.positions)
        retro = self.config.retro
        active = retro is not None and retrieval and retro.gate != 0.0 and batch.neighbours.shape[2] > 0
        neighbours = None
        for number, stack in enumerate(self.decoder, start=1):
            key = key_for(dropout_key, number)
            if active and neighbours is None and stack.group.layers[0].cca is not None:
                x_BTD, neighbours = self._first_cca_layer(stack, x_BTD, row, batch, key)
            else:
                x_BTD = stack(x_BTD, row, neighbours, key)
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    def output_table_VD(self) -> jax.Array:
        """The output layer's table [V, D]: the embedding's where they are tied."""
        return (self.embedding if self.output is None else self.output).table[...]

    def _check(self, batch: Batch) -> None:
        T, config = batch.tokens.shape[1], self.config
        L, K, R = batch.neighbours.shape[1:]
        if self.position is not None and config.max_positions < T:
            raise ValueError(f"rows of {T} tokens do not fit ModelConfig.max_positions={config.max_positions}; raise it")
        if config.retro is None or K == 0:
            return
        chunks = config.retro.chunks
        if batch.first_chunk_len is None and L * chunks.chunk_len != T:
            raise ValueError(
                f"Batch has {T} tokens and neighbours of {L} chunks of ChunkConfig.chunk_len={chunks.chunk_len}; "
                "give Batch.first_chunk_len, or cut rows on the grid"
            )
        if self.encoder is not None and self.encoder.position is not None and chunks.retrieved_len < R:
            raise ValueError(f"neighbours of {R} tokens do not fit ChunkConfig.retrieved_len={chunks.retrieved_len}; raise it")

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        x_BTD = self.embedding(tokens_BT)
        return x_BTD if self.position is None else x_BTD + self.position(positions_BT)

    def _first_cca_layer(
        self, stack: Stack, x_BTD: jax.Array, row: Row, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Neighbours]:
        """The layer whose normed states condition the encoder; returns the stream after it, and the encoded neighbours."""
        graph, state = nnx.split(stack.group)
        layer: DecoderLayer = nnx.merge(graph, jax.tree.map(lambda a: a[0], state)).layers[0]
        assert layer.norm_cca is not None
        keys = split_key(key, 4)
        x_BTD = layer.attend(x_BTD, row, keys[0])
        neighbours = self._encode(layer.norm_cca(x_BTD), batch, keys[1])
        return layer.finish(x_BTD, neighbours, keys[2:]), neighbours

    def _encode(self, normed_BTD: jax.Array, batch: Batch, key: jax.Array | None) -> Neighbours:
        retro, encoder = self.config.retro, self.encoder
        assert retro is not None and encoder is not None
        L, R = batch.neighbours.shape[1], batch.neighbours.shape[3]
        C = retro.chunks.chunk_len
        hide_key, encoder_key = split_key(key, 2)
        mask_BLKR = batch.neighbour_mask
        if retro.neighbour_dropout > 0.0 and hide_key is not None:
            shown_BL = jax.random.bernoulli(hide_key, 1.0 - retro.neighbour_dropout, mask_BLKR.shape[:2])
            mask_BLKR = mask_BLKR & shown_BL[:, :, None, None]
        chunks_BLCD, _ = in_chunks(normed_BTD, L, C, batch.first_chunk_len)
        chunk_mask_BLC = chunk_tokens(batch.segments, L, C, batch.first_chunk_len, cross_document=retro.cross_document)
        reads_BT = reads(
            batch.segments,
            mask_BLKR.any((2, 3)),
            chunk_len=C,
            first_chunk_len_B=batch.first_chunk_len,
            cross_document=retro.cross_document,
        )
        attended_BLKR = mask_BLKR if retro.encoder.padding == "masked" else jnp.ones_like(mask_BLKR)
        encoded = encoder(self._embed_neighbours(batch.neighbours, R), mask_BLKR, chunks_BLCD, chunk_mask_BLC, encoder_key)
        return Neighbours(encoded, attended_BLKR, reads_BT, batch.segments, batch.first_chunk_len)

    def _embed_neighbours(self, neighbours_BLKR: jax.Array, length: int) -> jax.Array:
        assert self.encoder is not None
        if self.encoder.embedding is not None:
            return self.encoder.embedding(neighbours_BLKR)
        e_BLKRD = self.embedding(neighbours_BLKR)
        # Megatron: with learned positions the decoder's table serves the neighbours too.
        if self.position is not None and self.encoder.config.positions == "learned":
            e_BLKRD = e_BLKRD + self.position(jnp.arange(length, dtype=jnp.int32))[None, None, None]
        return e_BLKRD


def with_vocab(config: ModelConfig, tokenizer_size: int) -> ModelConfig:
    """The config with ``vocab_size`` set: as given, or the tokenizer's size rounded up to a multiple of ``vocab_multiple``.

    Raises:
        ValueError: a given size is too small for the tokenizer.
    """
    if config.vocab_size is None:
        return dataclasses.replace(config, vocab_size=-(-tokenizer_size // config.vocab_multiple) * config.vocab_multiple)
    if config.vocab_size < tokenizer_size:
        raise ValueError(
            f"ModelConfig.vocab_size={config.vocab_size} is below the tokenizer's {tokenizer_size}; raise it, or leave it None"
        )
    return config


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, found without allocating any."""
    model = nnx.eval_shape(lambda: Retro(config, key=jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
