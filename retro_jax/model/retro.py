"""The whole model: a decoder that reads retrieved neighbours through chunked cross-attention, or its plain GPT twin."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import ModelConfig
from retro_jax.data.batch import Batch
from retro_jax.kernels.dropout import kept
from retro_jax.model.attention import causal_mask
from retro_jax.model.cca import Neighbours
from retro_jax.model.decoder import DecoderLayer, Row, Stack, runs
from retro_jax.model.division import encodes_own_chunks
from retro_jax.model.encoder import NeighbourEncoder
from retro_jax.model.grid import chunk_tokens, chunks_read, in_chunks, reads
from retro_jax.model.layers import Embedding, Noise, NormLayer, dropout, normal, numbered, parts
from retro_jax.model.packing import Places, places_of, readers_of
from retro_jax.parallel.axes import SEQUENCE, TENSOR, axis_index, axis_size, batch_index
from retro_jax.parallel.collectives import from_part_before, gather_row, gather_tokens, own_part, own_tokens
from retro_jax.parallel.recompute import recomputed


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

    def __call__(
        self,
        batch: Batch,
        *,
        retrieval: bool = True,
        dropout_key: jax.Array | None = None,
        row_numbers_B: jax.Array | None = None,
        places: int | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] from which the next token is predicted: logits = hidden @ output_table.T.

        Under ``jax.shard_map`` (:mod:`retro_jax.parallel`) the parameters and the batch are the parts that this device holds,
        and so is the result: of its rows' tokens the share that it has along ``tensor``.

        Args:
            batch: rows and their neighbours.
            retrieval: False leaves the retrieval path out, as if every neighbour were absent.
            dropout_key: seeds dropout and neighbour dropout; None: neither.
            row_numbers_B: uint32, the rows' places in the batch, which with the key say what is dropped; None: in order.
            places: the neighbours of so many chunks are encoded on this device, of those that some token reads
                (:mod:`retro_jax.model.packing`); where these are more, the result is NaN. None: of all chunks.

        Raises:
            ValueError: rows longer than the position table, or off the grid without ``first_chunk_len``, or with it and
                ``places``.
        """
        self._check(batch, places)
        batch = jax.tree.map(jnp.asarray, batch)
        if row_numbers_B is None:
            B = batch.tokens.shape[0]
            row_numbers_B = (batch_index() * B + jnp.arange(B)).astype(jnp.uint32)
        noises = parts(_tokens_noise(dropout_key, row_numbers_B, batch.tokens.shape[1]), len(self.decoder) + 1)
        x_BTD = dropout(self.embed(batch.tokens, batch.positions), self.config.dropout, noises[0])
        row = Row(causal_mask(batch.segments), batch.positions, row_numbers_B)
        retro = self.config.retro
        active = retro is not None and retrieval and retro.gate != 0.0 and batch.neighbours.shape[2] > 0
        neighbours = None
        for stack, noise in zip(self.decoder, noises[1:], strict=True):
            if active and neighbours is None and stack.group.layers[0].cca is not None:
                x_BTD, neighbours = self._first_cca_layer(stack, x_BTD, row, batch, noise, places)
            else:
                x_BTD = stack(x_BTD, row, neighbours, noise)
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    def layers(self) -> Iterator[DecoderLayer]:
        """The decoder's layers in order, each with parameters of its own."""
        for stack in self.decoder:
            yield from stack.layers()

    def output_table_VD(self) -> jax.Array:
        """The output layer's table [V, D], or this device's part of it: the embedding's where they are tied."""
        return (self.embedding if self.output is None else self.output).table[...]

    def _check(self, batch: Batch, places: int | None) -> None:
        T, config = batch.tokens.shape[1], self.config
        L, K, R = batch.neighbours.shape[1:]
        length = T * axis_size(SEQUENCE)
        if self.position is not None and config.max_positions < length:
            raise ValueError(f"rows of {length} tokens do not fit ModelConfig.max_positions={config.max_positions}; raise it")
        if config.retro is None or K == 0:
            return
        chunks = config.retro.chunks
        if batch.first_chunk_len is None and L * chunks.chunk_len != T:
            raise ValueError(
                f"Batch has {T} tokens and neighbours of {L} chunks of ChunkConfig.chunk_len={chunks.chunk_len}; "
                "give Batch.first_chunk_len, or cut rows on the grid"
            )
        if batch.first_chunk_len is not None and (axis_size(SEQUENCE) > 1 or places is not None):
            raise ValueError(
                "rows with a first_chunk_len of their own cannot be divided along the mesh's axis sequence, nor their chunks "
                "packed into places; set the axis to 1, and places to None"
            )
        if self.encoder is not None and self.encoder.position is not None and chunks.retrieved_len < R:
            raise ValueError(f"neighbours of {R} tokens do not fit ChunkConfig.retrieved_len={chunks.retrieved_len}; raise it")

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The stream [B, T, D] before the first layer."""
        x_BTD = self.embedding(tokens_BT)
        return x_BTD if self.position is None else x_BTD + self.position(positions_BT)

    def _first_cca_layer(
        self, stack: Stack, x_BTD: jax.Array, row: Row, batch: Batch, noise: Noise | None, places: int | None
    ) -> tuple[jax.Array, Neighbours]:
        """The layer whose normed states condition the encoder; returns the stream after it, and the encoded neighbours."""
        graph, state = nnx.split(stack.group)
        layer: DecoderLayer = nnx.merge(graph, jax.tree.map(lambda a: a[0], state)).layers[0]
        assert layer.norm_cca is not None
        noises = parts(noise, 4)
        x_BTD = recomputed(layer.attend, layer.recompute)(x_BTD, row, noises[0])
        neighbours = self.encode_chunks(layer.norm_cca(x_BTD), batch, row.numbers_B, noises[1], places)
        return recomputed(layer.finish, layer.recompute)(x_BTD, neighbours, noises[2:]), neighbours

    def encode_chunks(
        self,
        normed_BTD: jax.Array,
        batch: Batch,
        row_numbers_B: jax.Array,
        noise: Noise | None = None,
        places: int | None = None,
    ) -> Neighbours:
        """The encoded neighbours of all chunks, as every CCA layer reads them.

        Args:
            normed_BTD: the decoder's normed states at the first CCA layer, which condition the encoder.
            batch: its neighbours, segments and first_chunk_len.
            row_numbers_B, noise, places: as of :meth:`__call__`; they matter to dropout and to packed chunks.
        """
        retro, encoder = self.config.retro, self.encoder
        assert retro is not None and encoder is not None
        L = batch.neighbours.shape[1]
        C = retro.chunks.chunk_len
        alone = places is None and encodes_own_chunks(encoder, batch, normed_BTD)
        hide_noise, encoder_noise = parts(noise, 2)
        numbers_BL = _places(row_numbers_B, L)
        mask_BLKR = batch.neighbour_mask
        if retro.neighbour_dropout > 0.0 and hide_noise is not None:
            shown_BL1 = kept(hide_noise.key, retro.neighbour_dropout, numbers_BL, 1)
            mask_BLKR = mask_BLKR & shown_BL1[:, :, :, None]
        reads_BT = reads(
            gather_row(batch.segments),
            gather_row(mask_BLKR.any((2, 3))),
            chunk_len=C,
            first_chunk_len_B=batch.first_chunk_len,
            cross_document=retro.cross_document,
        )
        chunks_BLCD = None
        if encoder.reads_chunks:
            # A device's share of the tokens is its share of the chunks: where it encodes those, nothing is sent.
            states_BTD, here = (normed_BTD, L // axis_size(TENSOR)) if alone else (gather_tokens(normed_BTD), L)
            chunks_BLCD, _ = in_chunks(states_BTD, here, C, batch.first_chunk_len)
        chunk_mask_BLC = chunk_tokens(batch.segments, L, C, batch.first_chunk_len, cross_document=retro.cross_document)
        attended_BLKR = mask_BLKR if retro.encoder.padding == "masked" else jnp.ones_like(mask_BLKR)
        asked = (numbers_BL, mask_BLKR, chunk_mask_BLC)
        packed: Places | None = None
        neighbours_BLKR = batch.neighbours
        if alone:
            asked = jax.tree.map(own_tokens, asked)
        elif places is not None:
            packed = places_of(own_part(chunks_read(reads_BT, C)), places)
            pack = packed.pack
            asked, neighbours_BLKR, chunks_BLCD, attended_BLKR = jax.tree.map(
                pack, (asked, neighbours_BLKR, chunks_BLCD, attended_BLKR)
            )
        own_numbers_BL, own_mask_BLKR, own_chunk_mask_BLC = asked
        if encoder_noise is not None:
            encoder_noise = _neighbours_noise(encoder_noise.key, own_numbers_BL, own_mask_BLKR.shape, alone=alone)
        encoded_BLKRD = encoder(
            self._embed_neighbours(neighbours_BLKR, alone=alone),
            own_mask_BLKR,
            chunks_BLCD,
            own_chunk_mask_BLC,
            encoder_noise,
            alone=alone,
        )
        if packed is not None:
            encoded_BLKRD = jnp.where(packed.too_few, jnp.full_like(encoded_BLKRD, jnp.nan), encoded_BLKRD)
        last_chunks = packed.last_chunks if packed is not None else _last_chunks
        readers = None if packed is None else readers_of(packed, C, part_before=axis_size(SEQUENCE) > 1)
        if axis_size(SEQUENCE) > 1:
            attended_BLKR = jnp.concatenate([from_part_before(last_chunks(attended_BLKR)), attended_BLKR], axis=1)
        encoded_BLKRD = _for_all_heads(encoded_BLKRD, 1 if alone else 3, last_chunks)
        return Neighbours(encoded_BLKRD, attended_BLKR, own_part(reads_BT), batch.segments, batch.first_chunk_len, readers)

    def _embed_neighbours(self, neighbours_BLKR: jax.Array, *, alone: bool) -> jax.Array:
        """This device's share of each neighbour's tokens, embedded, or ``alone`` its share of the chunks."""
        assert self.encoder is not None
        share = 1 if alone else 3
        if self.encoder.embedding is not None:
            return self.encoder.embedding(neighbours_BLKR, share=share)
        e_BLKRD = self.embedding(neighbours_BLKR, share=share)
        # Megatron: with learned positions the decoder's table serves the neighbours too.
        if self.position is not None and self.encoder.config.positions == "learned":
            place_111R = jnp.arange(neighbours_BLKR.shape[3], dtype=jnp.int32)[None, None, None]
            e_BLKRD = e_BLKRD + self.position(place_111R, share=None if alone else 3)
        return e_BLKRD


def _last_chunks(x_BL: jax.Array) -> jax.Array:
    """[B, 1, ...]: of each row's last chunk."""
    return x_BL[:, -1:]


def _for_all_heads(encoded_BLKRD: jax.Array, dim: int, last_chunks: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Whole encoded neighbours for this device's heads of all CCA layers, from the shares of ``dim`` that the devices along
    ``tensor`` have, (t - 1) / t * B * L * K * R * D numbers; in front of them those of the last chunk of the part before."""
    devices = axis_size(TENSOR)
    if axis_size(SEQUENCE) == 1:
        return gather_tokens(encoded_BLKRD, dim)
    # One chunk, K * R * D / tensor numbers a row, to the next device: once for all CCA layers.
    if dim == 3:
        before_B1KRD = from_part_before(last_chunks(encoded_BLKRD))
        return gather_tokens(jnp.concatenate([before_B1KRD, encoded_BLKRD], axis=1), dim)
    encoded_BLKRD = gather_tokens(encoded_BLKRD, dim)
    last_B1KRD = last_chunks(encoded_BLKRD)
    if encoded_BLKRD.shape[3] % devices:
        before_B1KRD = from_part_before(last_B1KRD)  # all of it where the devices cannot share its tokens
    else:
        before_B1KRD = gather_tokens(from_part_before(own_tokens(last_B1KRD, 3)), 3)
    return jnp.concatenate([before_B1KRD, encoded_BLKRD], axis=1)


def _places(row_numbers_B: jax.Array, length: int) -> jax.Array:
    """uint32 [B, length]: the numbers in the whole batch of this device's ``length`` tokens, or chunks, of each row."""
    here = axis_index(SEQUENCE) * length + jnp.arange(length)
    return row_numbers_B[:, None] * jnp.uint32(length * axis_size(SEQUENCE)) + here.astype(jnp.uint32)[None]


def _tokens_noise(key: jax.Array | None, row_numbers_B: jax.Array, length: int) -> Noise | None:
    return None if key is None else numbered(key, _places(row_numbers_B, length))


def _neighbours_noise(key: jax.Array, chunk_numbers_BL: jax.Array, shape: tuple[int, ...], *, alone: bool) -> Noise:
    """The noise of neighbours' tokens [B * L * K, R], numbered through the chunks; ``alone``: all of them are this device's."""
    B, L, K, R = shape
    place_KR = jnp.arange(K * R, dtype=jnp.uint32).reshape(K, R)
    numbers_BLKR = chunk_numbers_BL[:, :, None, None] * jnp.uint32(K * R) + place_KR[None, None]
    numbers_XR = numbers_BLKR.reshape(B * L * K, R)
    return Noise(key, numbers_XR, numbers_XR) if alone else numbered(key, numbers_XR)


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


def unstacked(model: Retro) -> Retro:
    """The same model with a stack for every layer: nothing is sliced out of a stack where layers run one token at a time.

    It computes what ``model`` computes, and holds the decoder's parameters a second time.
    """
    graph, state = nnx.split(model)
    single = nnx.merge(graph, state)
    cca_layers = model.config.cca_layers
    stacks = []
    for number, layer in enumerate(model.layers(), 1):
        layer_graph, layer_state = nnx.split(layer)
        stack = nnx.eval_shape(lambda cca=number in cca_layers: Stack(model.config, (cca,), 1, key=jax.random.key(0)))
        stack.group.layers[0] = nnx.merge(layer_graph, jax.tree.map(lambda a: a[None], layer_state))
        stacks.append(stack)
    single.decoder = nnx.List(stacks)
    return single


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, found without allocating any."""
    model = nnx.eval_shape(lambda: Retro(config, key=jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
