"""Search that compares each query with every chunk, in JAX on all of this process's devices.

The database stays on disk. Its blocks go through the devices in turn, each device taking its share of a block: it multiplies, and
keeps the best of what it had and of its share. The devices' results are merged at the end; no device sends another anything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from retro_jax.artefact import Artefact
from retro_jax.config import Metric
from retro_jax.retrieval.memory import in_words
from retro_jax.retrieval.metric import distances_between, rounding
from retro_jax.retrieval.vectors import DenseVectors

if TYPE_CHECKING:
    import jax

EXACT = "exact"
# At most so much of one device's memory is taken, however large the database is.
DEVICE_BYTES = 2**28
QUERIES_AT_ONCE = 4096
LEAST_ROWS = 256


@dataclass(frozen=True)
class ExactIndex:
    """The vectors of the database, compared with every query. ``longest``: the length of the longest of them."""

    vectors: DenseVectors
    metric: Metric
    longest: float

    @classmethod
    def open(cls, artefact: Artefact, vectors: DenseVectors) -> ExactIndex:
        """The index of a finished artefact; it has nothing but its manifest."""
        return cls(vectors, artefact.summary["metric"], artefact.summary["longest"])

    @property
    def num_chunks(self) -> int:
        """Chunks of the database."""
        return len(self.vectors)

    def search(self, queries: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`retro_jax.retrieval.index.Index`. Products are float32, equal ones go to the lowest ids. A query of zeros
        (a text in which the embedder found nothing) has no neighbours."""
        width = min(width, self.num_chunks)
        ids_QW = np.full((len(queries), width), -1, np.int64)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            ids_QW[rows] = self._nearest(queries[rows], width)
        ids_QW[~queries.any(axis=1)] = -1
        return ids_QW, distances_between(self.metric, queries, self.vectors.vectors_ND, ids_QW)

    def rounding(self, queries: np.ndarray, farthest_Q: np.ndarray) -> np.ndarray:
        """See :class:`retro_jax.retrieval.index.Index`."""
        return rounding(self.metric, queries, farthest_Q, self.longest)

    def _nearest(self, queries_QD: np.ndarray, width: int) -> np.ndarray:
        """int64 [Q, width]. Queries and width are filled up to powers of two, so that few programs are compiled."""
        import jax

        count, dim = queries_QD.shape
        Q, W, N = power_of_two(count), power_of_two(width), self.num_chunks
        program, devices = _program(self.metric), jax.local_device_count()
        rows = min(rows_of_block(Q, W, dim), power_of_two(-(-N // devices)))
        filled_QD = jax.device_put(np.pad(queries_QD, ((0, Q - count), (0, 0))), program.everywhere)
        best = jax.device_put(_Best.none(devices, Q, W), program.divided)
        for start in range(0, N, devices * rows):
            block_ND = self.vectors.rows(start, min(start + devices * rows, N))
            block_ND = np.pad(block_ND, ((0, devices * rows - len(block_ND)), (0, 0)))
            place = jax.device_put((np.int32(start // devices), np.int32(min(N - start, len(block_ND)))), program.everywhere)
            before, best = best, program.step(best, filled_QD, jax.device_put(block_ND, program.divided), *place)
            jax.block_until_ready(before)  # no more than two blocks are on the devices: one at work, one on its way
        own_GQW = np.asarray(best.ids, np.int64)  # a device counts its own chunks, which are int32 however many there are of all
        own_GQW = np.where(
            own_GQW < 0, -1, own_GQW // rows * rows * devices + np.arange(devices)[:, None, None] * rows + own_GQW % rows
        )
        scores_QM, ids_QM = (part[:, :count].swapaxes(0, 1).reshape(count, -1) for part in (np.asarray(best.scores), own_GQW))
        order_QW = np.lexsort((ids_QM, -scores_QM), axis=1)[:, :width]
        return np.take_along_axis(ids_QM, order_QW, 1)


class _Best(NamedTuple):
    """The best chunks so far, [devices, Q, W]: scores float32, larger is nearer, and numbers int32 among the device's own chunks;
    -inf and -1 where there are none."""

    scores: jax.Array | np.ndarray
    ids: jax.Array | np.ndarray

    @classmethod
    def none(cls, devices: int, Q: int, W: int) -> _Best:
        return cls(np.full((devices, Q, W), -np.inf, np.float32), np.full((devices, Q, W), -1, np.int32))


class _Program(NamedTuple):
    """One block's step, and where its arguments lie: in equal parts along their first axis, or whole on every device."""

    step: Callable[..., _Best]
    divided: jax.sharding.Sharding
    everywhere: jax.sharding.Sharding


@functools.lru_cache(maxsize=3)
def _program(metric: Metric) -> _Program:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("shard",))

    def step(best: _Best, queries_QD: jax.Array, block_ND: jax.Array, first: jax.Array, filled: jax.Array) -> _Best:
        """One device's part: its share of the block is compared, and the best of it and of those before are kept. ``first``: how
        many of its chunks it has had before; ``filled``: rows of the whole block that are chunks."""
        rows, W = len(block_ND), best.ids.shape[2]
        filled = filled - jax.lax.axis_index("shard").astype(jnp.int32) * rows
        scores_QN = jnp.matmul(queries_QD, block_ND.T, precision="highest")
        if metric == "l2":
            scores_QN = 2 * scores_QN - jnp.sum(jnp.square(block_ND), axis=1)[None]
        scores_QN = jnp.where((jnp.arange(rows, dtype=jnp.int32) < filled)[None], scores_QN, -jnp.inf)
        # Those before stand first, and top_k prefers what stands first: of equal ones the lowest ids stay.
        scores_QW, place_QW = jax.lax.top_k(jnp.concatenate([best.scores[0], scores_QN], axis=1), W)
        before_QW = jnp.take_along_axis(best.ids[0], jnp.minimum(place_QW, W - 1), axis=1)
        ids_QW = jnp.where(place_QW < W, before_QW, first + place_QW - W)
        return _Best(scores_QW[None], jnp.where(scores_QW > -jnp.inf, ids_QW, -1)[None])

    shares = _Best(P("shard"), P("shard"))  # type: ignore[arg-type]
    divided = jax.shard_map(step, mesh=mesh, in_specs=(shares, P(), P("shard"), P(), P()), out_specs=shares)
    return _Program(jax.jit(divided), NamedSharding(mesh, P("shard")), NamedSharding(mesh, P()))


def rows_of_block(Q: int, W: int, dim: int) -> int:
    """How many of a block's vectors go to one device, a power of two: two blocks, the products, their copy beside the best so far
    and what choosing takes stay within ``DEVICE_BYTES``."""
    left = DEVICE_BYTES - 4 * (Q * dim + 6 * Q * W)
    return max(LEAST_ROWS, 2 ** int(math.log2(max(1, left // (4 * (2 * dim + 3 * Q))))))


def power_of_two(count: int) -> int:
    """The least power of two that is not below ``count``."""
    return 2 ** math.ceil(math.log2(max(1, count)))


def devices_in_words() -> str:
    """The devices that search, and what is taken of each."""
    import jax

    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind}, at most {in_words(DEVICE_BYTES)} of each"
