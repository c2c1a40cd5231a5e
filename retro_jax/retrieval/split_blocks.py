"""The chunks of all splits as one row of numbered blocks, and their results as one file a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_jax.array_files import save_array
from retro_jax.blocks import Block, concatenate_blocks, keep_blocks_of, run_blocks
from retro_jax.config import SPLITS, RetrievalConfig, Split
from retro_jax.retrieval.chunk_texts import ChunkTexts


@dataclass(frozen=True)
class SplitBlocks:
    """``config.block_chunks`` consecutive chunks of a split are a block; the train split's come first, of several splits."""

    config: RetrievalConfig
    texts: ChunkTexts
    splits: tuple[Split, ...] = SPLITS

    @property
    def chunks(self) -> dict[Split, int]:
        """Chunks of each split."""
        return {split: self.texts.table(split).num_chunks for split in self.splits}

    def run(
        self,
        folder: Path,
        compute: Callable[..., Block],
        *first_arguments: object,
        description: str,
        one_process: bool = False,
    ) -> None:
        """Store ``compute(*first_arguments, split, start, stop)`` of every block; see :func:`retro_jax.blocks.run_blocks`.

        ``one_process``: a process keeps all cores, or the accelerator, busy by itself, so that a machine has one; on a cluster
        each asks for ``ExecutorConfig.gpus``.
        """
        keep_blocks_of(folder, self.config.block_chunks)
        size = self.config.block_chunks
        tasks = (
            (*first_arguments, split, start, min(start + size, chunks))
            for split, chunks in self.chunks.items()
            for start in range(0, chunks, size)
        )
        total = sum(self._blocks(split) for split in self.splits)
        executor = self.config.executor
        run_blocks(
            folder,
            compute,
            tasks,
            workers=1 if one_process and executor.kind == "local" else self.config.workers,
            description=description,
            total=total,
            executor=executor,
            gpus=executor.gpus if one_process else 0.0,
            describe=lambda task: self.texts.table(task[-3]).describe(*task[-2:]),
        )

    def join(self, folder: Path, none: Mapping[str, np.ndarray]) -> None:
        """Write ``<split>.<name>.npy`` for every split and name: the blocks' arrays in order, or the array of ``none`` for a
        split without chunks."""
        first = 0
        for split in self.splits:
            count = self._blocks(split)
            for name, empty in none.items():
                path = folder / f"{split}.{name}.npy"
                if count:
                    concatenate_blocks(folder, count, name, path, first=first)
                else:
                    save_array(path, empty)
            first += count

    def _blocks(self, split: Split) -> int:
        return -(-self.chunks[split] // self.config.block_chunks)
