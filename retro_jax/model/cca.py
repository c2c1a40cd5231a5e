"""Chunked cross-attention (CCA) as a layer: projections, positions, gate and start around the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from retro_jax.config import ModelConfig
from retro_jax.kernels.chunked_cross_attention import chunked_cross_attention
from retro_jax.kernels.saved import from_arguments, where_kept
from retro_jax.model.attention import AttentionProjections, BlockShape, name_operands
from retro_jax.model.grid import reader_positions
from retro_jax.model.layers import (
    Initializer,
    Noise,
    constant,
    dropout,
    gathered,
    parameter,
    parts,
    project_in,
    project_out,
    rotate,
)
from retro_jax.model.packing import Readers
from retro_jax.parallel.axes import SEQUENCE, axis_size
from retro_jax.parallel.collectives import from_part_before, gathered_again, own_tokens


class Neighbours(NamedTuple):
    """What CCA reads: encoded neighbours, which of their tokens are valid, and which tokens of the row read at all.

    Where the devices along ``sequence`` hold parts of the rows, the first of the L chunks is the last one of the part before.
    With ``readers`` the chunks are packed, as one row of L places, and so are the queries that read them.
    """

    encoded_BLKRD: jax.Array
    mask_BLKR: jax.Array
    reads_BT: jax.Array
    segments_BT: jax.Array
    first_chunk_len_B: jax.Array | None
    readers: Readers | None = None


class ChunkedCrossAttention(AttentionProjections):
    """CCA of one decoder layer. Adds exactly 0, bias included, where a token reads nothing."""

    def __init__(self, config: ModelConfig, neighbour_width: int, *, key: jax.Array) -> None:
        retro, shape = config.retro, BlockShape.of_decoder(config)
        assert retro is not None
        start_key, own_key = jax.random.split(key)
        super().__init__(shape, neighbour_width, key=own_key)
        self.shape, self.retro = shape, retro
        width = retro.conv_width
        first = {"standard": 0, "copy": 1}[retro.cca_init]
        decay = {"standard": 0.0, "copy": 0.5}[retro.cca_init]
        key_start, query_start = _falling_taps(first, decay), _falling_taps(0, decay)
        self.key_conv = parameter(start_key, "taps kv_width", (width, neighbour_width), key_start) if width > 1 else None
        self.query_conv = parameter(start_key, "taps width", (width, config.width), query_start) if width > 1 else None
        null, heads = retro.null_key, (config.num_heads,)
        self.null_logit = None if null is None else parameter(start_key, "heads", heads, constant(null))
        self.gate = parameter(start_key, "", (), constant(1.0)) if retro.gate == "learned" else None
        if retro.cca_init == "copy":
            self._start_copying(config, neighbour_width, start_key)

    def __call__(self, x_BTD: jax.Array, neighbours: Neighbours, noise: Noise | None) -> jax.Array:
        """What CCA adds to the stream; ``x_BTD``, normed, is this device's share of the tokens."""
        retro, chunk_len = self.retro, self.retro.chunks.chunk_len
        B, L, K, R, _ = neighbours.encoded_BLKRD.shape
        first_chunk_len = 0 if axis_size(SEQUENCE) > 1 else neighbours.first_chunk_len_B
        weights_noise, out_noise = parts(noise, 2)
        q_BTNH = self._queries(x_BTD, lambda x_BTD: self._mix_in_documents(x_BTD, neighbours.segments_BT))
        k_XRGH, v_XRGH = self._keys_and_values(neighbours.encoded_BLKRD)
        if retro.cca_positions == "rotary":
            q_BTNH = self._rotate(q_BTNH, reader_positions(q_BTNH.shape[1], chunk_len, first_chunk_len))
            k_XRGH = self._rotate(k_XRGH, jnp.arange(R, dtype=jnp.int32)[None, :])
        numbers_BTN = None if weights_noise is None else weights_noise.queries(q_BTNH.shape[2], self.shape.num_heads)
        readers = neighbours.readers
        if readers is not None:
            q_BTNH, first_chunk_len = readers.pack(q_BTNH), 1
            numbers_BTN = None if numbers_BTN is None else readers.pack(numbers_BTN)
        q_BTNH, k_XRGH, v_XRGH = name_operands("cca", q_BTNH, k_XRGH, v_XRGH)
        o_BTNH = chunked_cross_attention(
            q_BTNH,
            k_XRGH.reshape(B, L, K * R, *k_XRGH.shape[2:]),
            v_XRGH.reshape(B, L, K * R, *v_XRGH.shape[2:]),
            neighbours.mask_BLKR.reshape(B, L, K * R),
            None if self.null_logit is None else self.null_logit[...],
            chunk_len=chunk_len,
            first_chunk_len=first_chunk_len,
            dropout=0.0 if weights_noise is None else self.shape.attention_dropout,
            dropout_key=None if weights_noise is None else weights_noise.key,
            query_numbers_BTN=numbers_BTN,
            implementation=self.shape.implementation,
        )
        if readers is not None:
            o_BTNH = readers.unpack(o_BTNH)
        return self._gated(o_BTNH, own_tokens(neighbours.reads_BT), out_noise)

    def keep(self, encoded_BKRD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K * R, G, H] of one chunk's encoded neighbours a row, for :meth:`read_kept`."""
        B, K, R, _ = encoded_BKRD.shape
        k_XRGH, v_XRGH = self._keys_and_values(encoded_BKRD[:, None])
        if self.retro.cca_positions == "rotary":
            k_XRGH = self._rotate(k_XRGH, jnp.arange(R, dtype=jnp.int32)[None, :])
        return k_XRGH.reshape(B, K * R, *k_XRGH.shape[2:]), v_XRGH.reshape(B, K * R, *v_XRGH.shape[2:])

    def read_kept(
        self,
        x_B1D: jax.Array,
        before_BUD: jax.Array,
        k_BSGH: jax.Array,
        v_BSGH: jax.Array,
        mask_BS: jax.Array,
        reads_B: jax.Array,
        since: jax.Array,
    ) -> jax.Array:
        """What CCA adds to one token a row, which reads the neighbours of one chunk; as :meth:`__call__` has it for that token.

        Args:
            x_B1D: the normed stream.
            before_BUD: of the tokens before, as many as the queries' convolution reaches back (:attr:`reach`); zeros before the
                first.
            k_BSGH, v_BSGH: of :meth:`keep`; S = K * R.
            mask_BS: their valid tokens.
            reads_B: whether the row's token reads at all.
            since: int32, how many tokens lie between the chunk's last token and this one; 0 for that token itself.
        """

        def mix(x_B1D: jax.Array) -> jax.Array:
            return x_B1D if self.query_conv is None else causal_convolution(x_B1D, gathered(self.query_conv), before_BUD, None)

        q_B1NH = self._queries(x_B1D, mix)
        if self.retro.cca_positions == "rotary":
            q_B1NH = self._rotate(q_B1NH, (since + self.retro.chunks.chunk_len - 1)[None, None])
        o_B1NH = chunked_cross_attention(
            q_B1NH,
            k_BSGH[:, None],
            v_BSGH[:, None],
            mask_BS[:, None],
            None if self.null_logit is None else self.null_logit[...],
            chunk_len=1,
            first_chunk_len=1,
            implementation=self.shape.implementation,
        )
        return self._gated(o_B1NH, reads_B[:, None], None)

    @property
    def reach(self) -> int:
        """How many tokens back a query looks before it reads (U)."""
        return 0 if self.query_conv is None else self.query_conv.whole[0] - 1

    def _queries(self, x_BTD: jax.Array, mix: Callable[[jax.Array], jax.Array]) -> jax.Array:
        (q_BTNH,) = project_in(x_BTD, lambda x_BTD: self.query(mix(x_BTD)), part=self.shape.recompute.part("cca"))
        return q_BTNH

    def _keys_and_values(self, e_BLKRD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B * L * K, R, G, H] each."""
        gathers_again = self.shape.recompute.part("cca").gathers_again
        k, v = gathered_again(self._project_neighbours, gathers_again)(e_BLKRD)
        return k.reshape(-1, *k.shape[3:]), v.reshape(-1, *v.shape[3:])

    def _project_neighbours(self, e_BLKRD: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.key_conv is None:
            return self.project_keys_and_values(e_BLKRD)
        e_XRD = e_BLKRD.reshape(-1, *e_BLKRD.shape[3:])
        mixed = causal_convolution(e_XRD, gathered(self.key_conv), jnp.zeros_like(e_XRD[:, :1]), None)
        return self.project_keys_and_values(e_BLKRD, mixed.reshape(e_BLKRD.shape))

    def _rotate(self, x_XTNH: jax.Array, positions_XT: jax.Array) -> jax.Array:
        return rotate(x_XTNH, positions_XT, fraction=self.shape.rotary_fraction, base=self.shape.rotary_base, scale=1.0)

    def _gated(self, o_BTNH: jax.Array, reads_BT: jax.Array, noise: Noise | None) -> jax.Array:
        """Heads projected back into the stream, gated, and exactly 0 where a token reads nothing."""
        y_BTD = dropout(project_out(o_BTNH, self.out, self.shape.recompute.part("cca")), self.shape.dropout, noise)
        gate = self.gate[...] if self.gate is not None else jnp.asarray(self.retro.gate, y_BTD.dtype)
        return where_kept(y_BTD * gate, reads_BT[:, :, None])

    def _mix_in_documents(self, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        if self.query_conv is None:
            return x_BTD
        last = (x_BTD[:, -self.reach :], segments_BT[:, -self.reach :])
        before = jax.tree.map(from_part_before, last)  # a few tokens a row from the part before
        return causal_convolution(x_BTD, gathered(self.query_conv), before[0], (segments_BT, before[1]))

    def _start_copying(self, config: ModelConfig, neighbour_width: int, key: jax.Array) -> None:
        N, H, D = config.num_heads, config.heads_dim, config.width
        if (neighbour_width, N * H, config.kv_heads) != (D, D, N):
            raise ValueError(
                f"RetroConfig.cca_init='copy' needs num_heads x head_dim = encoder width = width and no grouped queries, not "
                f"{N} x {H}, {neighbour_width}, {D} and {config.kv_heads} key/value heads; set cca_init='standard'"
            )
        key_key, value_key = jax.random.split(key)
        keys = jax.random.orthogonal(key_key, D, dtype=jnp.float32).reshape(D, N, H)
        values = jax.random.orthogonal(value_key, D, dtype=jnp.float32)
        self.query.weight[...] = keys
        self.key_value.weight[...] = jnp.stack([keys, values.reshape(D, N, H)], axis=1)
        self.out.weight[...] = self.retro.copy_strength * values.T.reshape(N, H, D)


def causal_convolution(
    x_XTD: jax.Array, taps_WD: jax.Array, before_XUD: jax.Array, segments: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """Depthwise causal convolution: y[t] = sum over w of taps[w] * x[t - w], within a document where segments are given.

    The backward pass keeps the arguments, and shifts again.

    Args:
        before_XUD: the tokens that precede x; zeros precede them.
        segments: of x and of the tokens before.
    """
    return from_arguments(_convolved)(x_XTD, taps_WD, before_XUD, segments)


def _convolved(
    x_XTD: jax.Array, taps_WD: jax.Array, before_XUD: jax.Array, segments: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    T, reach = x_XTD.shape[1], taps_WD.shape[0] - 1

    def with_what_precedes(x: jax.Array, before: jax.Array) -> jax.Array:
        missing = ((0, 0), (max(0, reach - before.shape[1]), 0), *((0, 0),) * (x.ndim - 2))
        return jnp.concatenate([jnp.pad(before, missing), x], axis=1)

    longer_XSD = with_what_precedes(x_XTD, before_XUD)
    longer_XS = None if segments is None else with_what_precedes(*segments)
    y = x_XTD * taps_WD[0][None, None]
    for back in range(1, reach + 1):
        start = longer_XSD.shape[1] - T - back
        shifted = longer_XSD[:, start : start + T]
        if segments is not None:
            assert longer_XS is not None
            same = longer_XS[:, start : start + T] == segments[0]
            shifted = jnp.where(same[:, :, None], shifted, jnp.zeros_like(shifted))
        y = y + shifted * taps_WD[back][None, None]
    return y


def _falling_taps(first: int, decay: float) -> Initializer:
    """Taps of 1 at ``first``, falling by ``decay`` from there, of length 1."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        taps_W = jnp.asarray([0.0 if w < first else decay ** (w - first) for w in range(shape[0])], jnp.float32)
        return jnp.broadcast_to((taps_W / jnp.sqrt((taps_W * taps_W).sum()))[:, None], shape)

    return init
