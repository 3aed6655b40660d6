"""Handlers of schema/block.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qmp.dispatcher import Handler
from vmm.control.interfaces import DiskView

__all__ = ["handlers"]

_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


def handlers(disks: Callable[[], Sequence[DiskView]]) -> dict[str, Handler]:
    """Command name -> handler."""
    return {"query-block": lambda call: [_block_info(disk) for disk in disks()]}


def _block_info(disk: DiskView) -> dict[str, Any]:
    return {
        "device": disk.id,
        "qdev": disk.qom_path,
        "type": "unknown",
        "removable": False,
        "locked": False,
        "inserted": {
            "file": disk.path,
            "ro": disk.read_only,
            "drv": "raw",
            "backing_file_depth": 0,
            "encrypted": False,
            "detect_zeroes": "off",
            **dict.fromkeys(_LIMITS, 0),
            "image": {"filename": disk.path, "format": "raw", "virtual-size": disk.length_bytes},
            "cache": {"writeback": disk.write_cache, "direct": False, "no-flush": False},
            "write_threshold": 0,
        },
    }
