"""The C library's allocator, told to keep what is freed.

XLA asks the C library for the buffers of every step anew and frees them after it. glibc gives large ones back to the system at
once, so that the next step faults every page in again: at the quick start's shape 33,000 page faults a step and a fifth of its
time.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

# Parameters of mallopt(3) and their values: all threads share one heap; no buffer is mapped on its own; the heap grows in
# steps of 256 MiB and is given back only where 2 GiB at its end are free.
ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -8, -4, -1, -2
SETTINGS = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**28}


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for its next use, where JAX will run on the CPU under glibc; to be called before JAX
    starts its threads. What the user has set by GLIBC_TUNABLES stands.

    Returns:
        Whether anything was set.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ or not _on_cpu():
        return False
    library = ctypes.CDLL(None)
    accepted = [library.mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items()]
    return all(accepted)


def _on_cpu() -> bool:
    """Whether JAX will choose the CPU: told without starting it."""
    wanted = os.environ.get("JAX_PLATFORMS")
    if wanted:
        return wanted == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("jax_plugins") is None
