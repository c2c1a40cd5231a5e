"""Freed memory is kept where JAX runs on the CPU, and nowhere else."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from retro_jax.host_memory import keep_freed_memory

GLIBC = platform.libc_ver()[0] == "glibc"
# Page faults of ten calls that each need 64 MiB of buffers. Buffers are freed a little later than they could be, so that the
# first dozen calls still take new ones.
FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from retro_jax.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
call = jax.jit(lambda x: jax.lax.optimization_barrier(jnp.sin(x)).sum())
x = jnp.ones(2**24)
for _ in range(40):
    jax.block_until_ready(call(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    jax.block_until_ready(call(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_buffers_are_not_faulted_in_again() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": "cpu"}
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS, how], env=environment, capture_output=True, check=True).stdout)
        for how in ("keep", "leave")
    ]
    assert faults[0] < 0.1 * faults[1], faults


@pytest.mark.parametrize(("name", "value"), [("JAX_PLATFORMS", "cuda"), ("GLIBC_TUNABLES", "glibc.malloc.top_pad=0")])
def test_other_devices_and_a_users_own_settings_are_left_alone(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
