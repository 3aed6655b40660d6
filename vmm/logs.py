"""-d, -D and -msg: which of the program's loggers are heard, where, and how a line begins.

pageferry: warning: text                            plain
2026-01-31T12:00:00.123456Z guest pageferry: text   -msg timestamp=on,guest-name=on
"""

from __future__ import annotations

import logging
import sys
import time

from vmm.config import Settings
from vmm.errors import OptionError

__all__ = ["set_up_logs"]

LOGGERS: dict[str, tuple[str, ...]] = {
    "machine": ("vmm.machine", "vmm.app", "vmm.chardev"),
    "migration": ("vmm.migration",),
    "qmp": ("qmp", "vmm.control"),
    "cpu": ("vmm.cpu",),
    "unimp": ("vmm.devices.bus",),
    "guest_errors": ("vmm.devices",),
}
"""-d item -> the loggers it turns on; `vmm.option_table.LOG_ITEMS` has their texts."""


class _Formatter(logging.Formatter):
    def __init__(self, timestamp: bool, guest_name: str | None) -> None:
        super().__init__()
        self._timestamp = timestamp
        self._prefix = f"{guest_name} pageferry: " if guest_name else "pageferry: "

    def format(self, record: logging.LogRecord) -> str:
        level = "warning: " if record.levelno == logging.WARNING else ""
        text = f"{self._prefix}{level}{record.getMessage()}"
        if self._timestamp:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            text = f"{stamp}.{int(record.created % 1 * 1e6):06d}Z {text}"
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return text


def set_up_logs(settings: Settings) -> None:
    """Once, at the start. Raises OptionError if the log file cannot be opened."""
    config = settings.log
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if config.file is not None:
        try:
            handler = logging.FileHandler(config.file)
        except OSError as error:
            raise OptionError(f"Could not open '{config.file}': {error.strerror}", "-D") from error
    guest_name = settings.machine.name if config.guest_name else None
    handler.setFormatter(_Formatter(config.timestamp, guest_name))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for item in config.items:
        for name in LOGGERS[item]:
            logging.getLogger(name).setLevel(logging.DEBUG)
    for text in settings.warnings:
        root.warning("%s", text)
