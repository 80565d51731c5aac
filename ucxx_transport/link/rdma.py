"""Which RDMA hardware this host has, as the kernel shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["RDMA_FOLDER", "rdma_devices"]

RDMA_FOLDER: Final = Path("/sys/class/infiniband")
"""One entry a device, InfiniBand or not (RoCE, iWARP, EFA): Linux, Documentation/ABI/stable/sysfs-class-infiniband."""


def rdma_devices(sysfs: Path = RDMA_FOLDER) -> list[str]:
    """RDMA devices of this host, such as `mlx5_0`; none where the kernel has no RDMA at all."""
    return sorted(device.name for device in sysfs.glob("*"))
