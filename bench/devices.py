"""What devices can read and hold, for the cost model; figures that were measured here, or else published.

`read_gb_per_s` is what a kernel that does nothing but read may reach, in 1e9 bytes a second; `source` says where it is
from, since a data sheet promises what no kernel quite reaches. `memory_bytes` is what the driver lets programs see, a
little less than is printed on the box, and RESERVED of it goes to the CUDA context and the allocator before a model
gets any.
"""

from __future__ import annotations

import os
from typing import NamedTuple

RESERVED = 1 << 29  # bytes
_GIB = 1 << 30


class Device(NamedTuple):
    """A device: its name as --device has it, its full name, bytes of memory, 1e9 bytes a second, and whence these."""

    name: str
    title: str
    memory_bytes: int
    read_gb_per_s: float
    source: str


_SHEET = "the data sheet's"
DEVICES = {
    device.name: device
    for device in (
        Device("h200", "H200, 141 GB", int(139.8 * _GIB), 4300, "nine tenths of the data sheet's 4800"),
        Device("h100", "H100 SXM, 80 GB", 85017493504, 3099, "measured, bench/results/nvidia-h100-80gb-hbm3"),
        Device("a100", "A100 SXM, 80 GB", int(79.1 * _GIB), 2040, _SHEET),
        Device("a100-40gb", "A100, 40 GB", int(39.4 * _GIB), 1555, _SHEET),
        Device("4090", "RTX 4090, 24 GB", int(23.6 * _GIB), 1010, _SHEET),
        Device("3090", "RTX 3090, 24 GB", int(23.6 * _GIB), 936, _SHEET),
        Device("3060", "RTX 3060, 12 GB", int(11.7 * _GIB), 360, _SHEET),
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
