"""-d and -D: which of the program's loggers are heard, and where."""

from __future__ import annotations

import logging
import sys

from vmm.config import Settings
from vmm.errors import OptionError
from vmm.messages import Heading

__all__ = ["set_up_logs"]

LOGGERS: dict[str, tuple[str, ...]] = {
    "machine": ("vmm.machine", "vmm.machine_run", "vmm.machine_wishes", "vmm.app", "vmm.chardev"),
    "migration": ("vmm.migration",),
    "qmp": ("qmp", "vmm.control"),
    "cpu": ("vmm.cpu",),
    "unimp": ("vmm.devices.bus",),
    "guest_errors": ("vmm.devices",),
}
"""-d item -> the loggers it turns on; `vmm.option_table.LOG_ITEMS` has their texts."""


class _Formatter(logging.Formatter):
    def __init__(self, heading: Heading) -> None:
        super().__init__()
        self._heading = heading

    def format(self, record: logging.LogRecord) -> str:
        level = "warning: " if record.levelno == logging.WARNING else ""
        text = self._heading.line(level + record.getMessage(), record.created)
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return text


def set_up_logs(settings: Settings, heading: Heading) -> None:
    """Once, at the start. Raises OptionError if the log file cannot be opened."""
    config = settings.log
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if config.file is not None:
        try:
            handler = logging.FileHandler(config.file)
        except OSError as error:
            raise OptionError(f"Could not open '{config.file}': {error.strerror}", "-D") from error
    handler.setFormatter(_Formatter(heading))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for item in config.items:
        for name in LOGGERS[item]:
            logging.getLogger(name).setLevel(logging.DEBUG)
    for text in settings.warnings:
        root.warning("%s", text)
