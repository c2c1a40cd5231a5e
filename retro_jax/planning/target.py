"""The accelerators that a plan can be made for, from their vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """One accelerator: bytes of memory, dense bfloat16 operations a second without sparsity, bytes a second from its memory, to
    another one of the same host in one direction, and to one of another host; and how many a host has.

    What XLA asks beside, to compile for it: compute capability, multiprocessors and their 32-bit units, GHz, bytes of a
    multiprocessor's shared memory and of the second-level cache.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    within_host: float
    between_hosts: float
    devices_a_host: int = 8
    capability: int = 9
    cores: int = 132
    units: int = 128
    clock: float = 1.98
    shared_memory: int = 233472
    cache: int = 52428800

    @property
    def description(self) -> str:
        """XLA's ``GpuTargetConfigProto`` as text."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared_memory - 1024}
              shared_memory_per_core: {self.shared_memory} core_count: {self.cores} fpus_per_core: {self.units}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.cache} clock_rate_ghz: {self.clock}
              device_memory_size: {int(self.memory)} registers_per_core_limit: 65536 registers_per_block_limit: 65536
              cuda_compute_capability {{ major: {self.capability} }}
            }}
            platform_name: "CUDA" device_description_str: "NVIDIA {self.name}"
            dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 12 minor: 8 }}"""


TARGETS = {
    "a100": Target(
        name="A100 SXM 80 GB", memory=80e9, flops=312e12, bandwidth=2.039e12, within_host=300e9, between_hosts=25e9,
        capability=8, cores=108, units=64, clock=1.41, shared_memory=167936, cache=41943040,
    ),
    "h100": Target(name="H100 SXM", memory=80e9, flops=989e12, bandwidth=3.35e12, within_host=450e9, between_hosts=50e9),
    "h200": Target(name="H200 SXM", memory=141e9, flops=989e12, bandwidth=4.8e12, within_host=450e9, between_hosts=50e9),
}  # fmt: skip
