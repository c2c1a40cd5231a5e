"""faiss on GPUs, where faiss-gpu is installed and finds some; nothing here is called for faiss-cpu."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

# What faiss's GPU indexes find and look into at most; wider searches go to the index in the machine's memory.
MOST_FOUND = MOST_LISTS = 2048


def num_gpus(faiss: ModuleType) -> int:
    """GPUs that faiss can use; 0 with faiss-cpu."""
    return faiss.get_num_gpus()


def cluster_on_gpus(faiss: ModuleType, index: Any) -> Any:
    """Let the GPUs assign vectors to centroids while the inverted lists of an empty index are trained.

    Returns:
        What must live until the index is trained.
    """
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is None or not num_gpus(faiss):
        return None
    assigning = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(inverted.d))
    inverted.clustering_index = assigning
    return assigning


def copy_to_gpus(faiss: ModuleType, index: Any, parameters: str) -> Any:
    """A copy of an index on every GPU, which share the queries; None without a GPU, and where the index does not fit there or
    is of a kind that GPUs do not search, which is said."""
    inverted = faiss.try_extract_index_ivf(index) if num_gpus(faiss) else None
    if not num_gpus(faiss) or (inverted is not None and inverted.nprobe > MOST_LISTS):
        return None
    try:
        copy = faiss.index_cpu_to_all_gpus(index)
        if inverted is not None:
            faiss.GpuParameterSpace().set_index_parameters(copy, parameters)
    except RuntimeError as error:
        print(f"the index is searched on the CPU, not on {num_gpus(faiss)} GPUs: {str(error).strip()}", file=sys.stderr)
        return None
    return copy


def fits_gpus(width: int) -> bool:
    """Whether so many chunks a query can be found on a GPU."""
    return width <= MOST_FOUND
