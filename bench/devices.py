"""What devices can read and hold and what connects them, for the cost model; measured here, or else published.

`read_gb_per_s` is what a kernel that does nothing but read may reach, in 1e9 bytes a second; `source` says where it is
from, since a data sheet promises what no kernel quite reaches. `memory_bytes` is what the driver lets programs see, a
little less than is printed on the box, and RESERVED of it goes to the CUDA context and the allocator before a model
gets any.

`gb_per_s` of a link is one direction of its data sheet. `latency_us`, what a collective operation of a few kilobytes
takes at the least, start and synchronization included, is an ASSUMPTION, not a measurement: two GPUs on NVLink or on
PCIe with peer access are faster, eight on PCIe without it or sockets over a busy network slower. `--link-latency` puts
what `all_reduce_perf` of nccl-tests shows in its place.
"""

from __future__ import annotations

import os
from typing import NamedTuple

RESERVED = 1 << 29  # bytes
_GIB = 1 << 30


class Link(NamedTuple):
    """What connects GPUs or machines: its name as --link has it, 1e9 bytes a second each way, microseconds."""

    name: str
    title: str
    gb_per_s: float
    latency_us: float


LINKS = {
    link.name: link
    for link in (
        Link("nvlink4", "NVLink 4 of H100 and H200, 18 links", 450, 10),
        Link("nvlink3", "NVLink 3 of A100, 12 links", 300, 10),
        Link("pcie5", "PCIe 5.0 x16", 63, 20),
        Link("pcie4", "PCIe 4.0 x16", 31.5, 20),
        Link("infiniband-400", "InfiniBand NDR, 400 Gb/s", 50, 30),
        Link("ethernet-100", "Ethernet, 100 Gb/s", 12.5, 60),
        Link("ethernet-10", "Ethernet, 10 Gb/s", 1.25, 100),
    )
}


class Device(NamedTuple):
    """A device: its name as --device has it, its full name, bytes of memory, 1e9 bytes a second, whence these, and the
    link between several in one machine, where one is known.
    """

    name: str
    title: str
    memory_bytes: int
    read_gb_per_s: float
    source: str
    link: str | None = None


_SHEET = "the data sheet's"
DEVICES = {
    device.name: device
    for device in (
        Device("h200", "H200, 141 GB", int(139.8 * _GIB), 4300, "nine tenths of the data sheet's 4800", "nvlink4"),
        Device(
            "h100", "H100 SXM, 80 GB", 85017493504, 3099, "measured, bench/results/nvidia-h100-80gb-hbm3", "nvlink4"
        ),
        Device("a100", "A100 SXM, 80 GB", int(79.1 * _GIB), 2040, _SHEET, "nvlink3"),
        Device("a100-40gb", "A100, 40 GB", int(39.4 * _GIB), 1555, _SHEET, "nvlink3"),
        Device("4090", "RTX 4090, 24 GB", int(23.6 * _GIB), 1010, _SHEET, "pcie4"),
        Device("3090", "RTX 3090, 24 GB", int(23.6 * _GIB), 936, _SHEET, "pcie4"),
        Device("3060", "RTX 3060, 12 GB", int(11.7 * _GIB), 360, _SHEET, "pcie4"),
    )
}
MEASURED = ("cpu", "cuda")  # what --device takes besides: the machine that this runs on


def measured(name: str, seconds: float = 0.3) -> Device:
    """Measure this machine's processor or GPU, which takes about two seconds.

    Args:
        name: "cpu" or "cuda".
        seconds: as `measure_limits` takes them.
    """
    import torch

    from ropewalk.bench.limits import measure_limits
    from ropewalk.bench.report import machine

    device = torch.device(name)
    found, read = machine(device), measure_limits(device, seconds).read_gb_per_s
    if device.type == "cuda":
        return Device(name, found["gpu"]["name"], found["gpu"]["memory"], read, "measured now")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(name, f"{found['cpu']}, {found['threads']} threads", memory, read, "measured now")
