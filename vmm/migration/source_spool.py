"""The source's use of a keeper: from before the hand-over in postcopy until nobody needs its RAM any more."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

from vmm.migration.params import Capability
from vmm.migration.spool import Keeper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.migration.page_pump.sender import PageSender
    from vmm.migration.params import Capabilities, Parameters
    from vmm.ram import RAMBlock

__all__ = ["SourceSpool"]

log = logging.getLogger(__name__)


class SourceSpool:
    """Nothing at all unless the capability is on. Used by mig/source alone."""

    def __init__(self, capabilities: Capabilities, parameters: Parameters) -> None:
        on = capabilities[Capability.X_POSTCOPY_SPOOL]
        self._path = parameters.postcopy_spool_path if on else ""
        self._keeper: Keeper | None = None
        self.keeper_pid: int | None = None

    def keep(self, migration: bytes | None, blocks: Sequence[RAMBlock], sender: PageSender) -> None:
        """The guest has stopped for good here: from now on this process may be killed.

        Pages that go out or come back later do not matter: the keeper has them all as they are now. A spool
        of an older guest goes first. Without a keeper the migration goes on unprotected; the log says so.
        """
        if not self._path:
            return
        began_s = time.monotonic()
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._keeper = Keeper(self._path, migration, blocks, sender.dirty)
        except OSError as error:
            log.warning("no keeper, so nothing outlives this process: %s", error)
            return
        self.keeper_pid = self._keeper.pid
        took_ms = (time.monotonic() - began_s) * 1000
        log.info("keeper %d holds %d pages; it took %.1f ms", self.keeper_pid, sender.dirty_count(), took_ms)

    def dismiss(self) -> None:
        """The destination has everything, or the guest runs here again."""
        if self._keeper is not None:
            self._keeper.dismiss()
            self._keeper = None
