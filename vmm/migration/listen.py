"""mig/listen: from LISTEN on it owns the stream, the userfaultfd and the end of the migration.

    load thread                     mig/listen
    LISTEN: register RAM, start --> serves faults and pages (C, without the GIL)
    device state, RUN, CPUs start      |
    done  ---------------------------> | END: every page received? unregister, close, report

The userfaultfd is closed only when no page is missing (design rule 4). If the channel is lost, the guest
goes on until it needs a missing page; faults that need no source are still served, and pages stay missing.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from uffd import Features, Mode, Userfaultfd
from vmm.errors import PageferryError
from vmm.migration.errors import Cancelled, LostPages, reason
from vmm.migration.page_pump.receiver import Heard

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.loader import Loader
    from vmm.ram import GuestRam, RAMBlock

__all__ = ["ListenThread"]

log = logging.getLogger(__name__)


class ListenThread:
    """Receives the rest of a guest that may already run.

    `on_end` is called once when every page is here and the RAM is plain memory again; `on_lost` each time the
    channel is lost or the stream turns out to be wrong, with the reason. Both on the mig/listen thread.
    """

    def __init__(
        self,
        ram: GuestRam,
        loader: Loader,
        on_end: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        assert loader.return_path is not None, "LISTEN is checked to come after OPEN_RETURN_PATH"
        self._ram = ram
        self._loader = loader
        self._return_path = loader.return_path
        self._on_end = on_end
        self._on_lost = on_lost
        self._package_loaded = threading.Event()
        self._package_failed = False
        self.ended = False
        self._uffd = Userfaultfd(Features.THREAD_ID)
        self._thread = threading.Thread(target=self._main, name="mig/listen")
        self.error: BaseException | None = None

    def start(self) -> None:
        """Sensitise the RAM and start the thread. Raises uffd.UffdError if the kernel refuses."""
        registered = []
        try:
            for block in self._loader.blocks:
                self._uffd.register(block.host_address, block.length_bytes, Mode.MISSING)
                registered.append(block)
        except Exception:
            for block in registered:
                self._uffd.unregister(block.host_address, block.length_bytes)
            self._uffd.close()
            raise
        self._ram.set_read_guard(self._is_readable)
        self._thread.start()

    def package_loaded(self) -> None:
        """mig/load is done with the package and the guest was started; END may be declared. Any thread."""
        self._package_loaded.set()

    def give_up(self) -> None:
        """End the thread soon; the caller has set the cancel event that the loader's reader waits with."""
        self._package_failed = True
        self._package_loaded.set()

    def abandon(self) -> None:
        """The package failed, and the guest will not start here: its RAM is worth nothing any more.

        The caller has set the cancel event. (mig/load)
        """
        if self._thread.ident is None:
            return  # `start` has failed, and has left nothing behind
        self.give_up()
        self._thread.join()
        self._desensitise()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread; False after the timeout. Raises what the thread raised."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        if self.error is not None:
            raise self.error
        return not self._thread.is_alive()

    def _is_readable(self, block: RAMBlock, first_page: int, page_count: int) -> bool:
        """Would a read of these pages return at once? (Any thread; a page that arrives meanwhile is a no.)"""
        clear = self._loader.receiver.received[block.name].find_next_clear(first_page)
        return clear is None or clear >= first_page + page_count

    def _main(self) -> None:
        try:
            self._receive()
        except Cancelled:
            log.info("mig/listen: given up; the userfaultfd stays open while pages are missing")
        except BaseException as error:
            self.error = error
            log.exception("mig/listen failed")
            self._on_lost(reason(error))

    def _receive(self) -> None:
        receiver = self._loader.receiver
        while not self._listen_once():
            pass
        self._package_loaded.wait()
        if self._package_failed:
            return
        missing = receiver.missing()
        if missing:
            self._hold(str(LostPages(missing)))
            return
        self._desensitise()
        self.ended = True
        self._on_end()

    def _listen_once(self) -> bool:
        """Serve until the stream ends (True) or a failure; after that serve what needs no source."""
        receiver, loader = self._loader.receiver, self._loader
        try:
            if receiver.listen(self._uffd.fd, self._return_path, loader.ram_section_id) is Heard.END:
                return True
            text = "The connection to the source was lost"
        except (PageferryError, OSError) as error:
            if isinstance(error, Cancelled):
                raise
            text = reason(error)
        self._hold(text)
        return False

    def _hold(self, text: str) -> None:
        """Pages are missing and nobody sends them: report, and keep the missing pages missing."""
        self._on_lost(text)
        self._loader.receiver.no_channel()
        self._loader.receiver.listen(self._uffd.fd, self._return_path, self._loader.ram_section_id)

    def _desensitise(self) -> None:
        """Make RAM plain memory again.

        When every page is received, what is absent is a page of zeroes, and the kernel's own one is right.
        """
        for block in self._loader.blocks:
            self._uffd.unregister(block.host_address, block.length_bytes)
        self._uffd.close()
        self._ram.set_read_guard(None)
