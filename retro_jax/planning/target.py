"""The accelerators that a plan can be made for, from their vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """One accelerator: bytes of memory, dense bfloat16 operations a second without sparsity, bytes a second from its memory, to
    another one of the same host in one direction, and to one of another host; and how many a host has."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    within_host: float
    between_hosts: float
    devices_a_host: int = 8


TARGETS = {
    "a100": Target(name="A100 SXM 80 GB", memory=80e9, flops=312e12, bandwidth=2.039e12, within_host=300e9, between_hosts=25e9),
    "h100": Target(name="H100 SXM", memory=80e9, flops=989e12, bandwidth=3.35e12, within_host=450e9, between_hosts=50e9),
    "h200": Target(name="H200 SXM", memory=141e9, flops=989e12, bandwidth=4.8e12, within_host=450e9, between_hosts=50e9),
}
