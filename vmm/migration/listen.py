"""mig/listen: from LISTEN on it owns the stream, the userfaultfd and the end of the migration.

    load thread                     mig/listen
    arm: register RAM, start -----> waits
    LISTEN ----------------------> serves faults and pages (C, without the GIL)
    device state, RUN, CPUs start      |          ^
    done  --------------------->       |          | RECV_BITMAP, RESUME on a new channel
                                       |          |
                                       |---> the channel is lost: hold
                                       v
                                     END: every page received? unregister, close, report

A Pageferry source lets us arm while its guest still runs, at the ping behind its discards: only discards
touch RAM from there to LISTEN. Any other source stops its guest first, and we arm at LISTEN.

The userfaultfd is closed only when no page is missing (design rule 4). If the channel is lost, the guest
goes on until it needs a missing page; faults that need no source are still served, and pages stay missing.
`resume` gives a held thread a new channel. When faults cannot be served any more, `on_dead` is told.

Source: QEMU 7.2 migration/savevm.c (postcopy_ram_listen_thread, postcopy_pause_incoming).
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Protocol

from uffd import Features, Mode, Userfaultfd
from vmm.errors import PageferryError
from vmm.migration.cancel import KickEvent
from vmm.migration.errors import Cancelled, LostPages, PeerClosed, PeerError, reason
from vmm.migration.page_pump.receiver import Heard, ReturnPathWriter
from vmm.migration.recovery import DestinationRecovery
from vmm.migration.stream import read_record

if TYPE_CHECKING:
    from vmm.migration.byte_stream import StreamReader
    from vmm.migration.loader import Loader
    from vmm.ram import GuestRam, RAMBlock

__all__ = ["ListenHost", "ListenThread"]

log = logging.getLogger(__name__)


class ListenHost(Protocol):
    """Who is told; every method is called on mig/listen."""

    def on_end(self) -> None:
        """Every page is here and the RAM is plain memory again. Called once."""

    def on_lost(self, text: str) -> None:
        """The channel is lost, or the stream is wrong: pages are missing, and nobody sends them."""

    def on_recover(self) -> None:
        """A source has come on a new channel."""

    def on_resume(self) -> None:
        """Recovery is agreed; pages come again."""

    def on_dead(self, text: str) -> None:
        """Faults are served no more: who touches a missing page waits for ever."""


class ListenThread:
    """Receives the rest of a guest that may already run."""

    def __init__(self, ram: GuestRam, loader: Loader, host: ListenHost) -> None:
        assert loader.return_path is not None, "LISTEN is checked to come after OPEN_RETURN_PATH"
        self._ram = ram
        self._loader = loader
        self._return_path = loader.return_path
        self._host = host
        self._recovery: DestinationRecovery | None = None
        self._kick = KickEvent()
        self._offer_lock = threading.Lock()  # protects _offer
        self._offer: tuple[StreamReader, ReturnPathWriter, DestinationRecovery] | None = None
        self._begin = threading.Event()
        self._listens = False
        self._package_loaded = threading.Event()
        self._package_failed = False
        self.ended = False
        self._is_plain = False  # who sets it has joined the other, or is it
        self._uffd = Userfaultfd(Features.THREAD_ID)
        self._thread = threading.Thread(target=self._main, name="mig/listen")
        self.error: BaseException | None = None

    def arm(self) -> None:
        """Sensitise the RAM and start the thread, which waits for `listen`. Whoever touches a missing page
        waits for it, too.

        Raises uffd.UffdError if the kernel refuses; nothing is left then.
        """
        registered = []
        self._ram.set_read_guard(self._is_readable)
        try:
            for block in self._loader.blocks:
                self._uffd.register(block.host_address, block.length_bytes, Mode.MISSING)
                registered.append(block)
        except Exception:
            for block in registered:
                self._uffd.unregister(block.host_address, block.length_bytes)
            self._uffd.close()
            self._ram.set_read_guard(None)
            raise
        self._thread.start()

    def listen(self) -> None:
        """LISTEN: faults are served from now on, and the stream is the thread's."""
        self._listens = True
        self._begin.set()

    def package_loaded(self) -> None:
        """mig/load is done with the package and the guest was started; END may be declared. Any thread."""
        self._package_loaded.set()

    @property
    def package_is_loaded(self) -> bool:
        """Is mig/load done with the package, or has it given up? Else a device of it may wait for a page."""
        return self._package_loaded.is_set()

    def resume(
        self, reader: StreamReader, return_path: ReturnPathWriter, recovery: DestinationRecovery
    ) -> None:
        """Go on with a new channel; the thread takes it as soon as it holds. Any thread."""
        with self._offer_lock:
            self._offer = (reader, return_path, recovery)
        self._kick.kick()

    def give_up(self) -> None:
        """End the thread soon; the caller has set the cancel event that the loader's reader waits with."""
        self._package_failed = True
        self._package_loaded.set()
        self._begin.set()

    def abandon(self) -> None:
        """The package failed, and the guest will not start here: its RAM is worth nothing any more.

        The caller has set the cancel event. (mig/load)
        """
        if self._thread.ident is None:
            return  # `arm` has failed, and has left nothing behind
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
        """Would a read of these pages return at once? (Any thread; a page that arrives meanwhile is a no.)

        A page received as zero is absent. Before LISTEN, and after a failure, nobody serves the fault on it.
        """
        maps, end = self._loader.receiver.blocks.maps, first_page + page_count
        clear = maps["received"][block.name].find_next_clear(first_page)
        if clear is not None and clear < end:
            return False
        if self._listens and self.error is None:
            return True
        absent = maps["zero"][block.name].find_next_set(first_page)
        return absent is None or absent >= end

    def _main(self) -> None:
        try:
            self._begin.wait()
            if not self._listens:
                raise Cancelled()
            while (lost := self._follow()) is not None:
                self._hold(lost)
            self._desensitise()
            self.ended = True
            self._host.on_end()
        except Cancelled:
            log.info("mig/listen: given up; the userfaultfd stays open while pages are missing")
        except BaseException as error:
            self.error = error
            log.exception("mig/listen failed")
            self._host.on_dead(reason(error))

    # ---- a channel ----

    def _follow(self) -> str | None:
        """Serve faults and the stream; None at the end of the migration, else why it cannot go on."""
        loader = self._loader
        try:
            while True:
                match loader.receiver.listen(self._uffd.fd, self._return_path, loader.ram_section_id):
                    case Heard.COMMAND:
                        self._obey()
                    case Heard.END:
                        self._check_end()
                        return None
                    case _:
                        raise PeerClosed("The connection to the source was lost")
        except Cancelled:
            raise
        except (PageferryError, OSError) as error:
            self._withdraw(error)
            return reason(error)

    def _withdraw(self, error: BaseException) -> None:
        """A guest that may not start yet never will: mig/load gives the attempt up.

        A device that it loads may wait for a page of a ring, and nobody sends that any more: it reads zeroes,
        in a RAM that no guest will ever run in.

        Raises:
            Cancelled: it will not start.
        """
        order = self._loader.order
        if order is not None and order.withdraw(error):
            self._desensitise()
            raise Cancelled()

    def _obey(self) -> None:
        record = read_record(self._loader.reader)
        if self._recovery is not None:
            if self._recovery.obey(record):
                self._host.on_resume()
                self._recovery.resume()
                self._recovery = None
        else:
            self._loader.obey_order(record)

    def _check_end(self) -> None:
        """The source has said that this is all.

        Raises:
            PeerError, LostPages: it is not.
            Cancelled: mig/load has given up.
        """
        if self._recovery is not None:
            raise PeerError("The stream has ended before recovery was agreed")
        if self._loader.order is not None and self._loader.order.state.value == "waiting":
            raise PeerError("The stream has ended before the guest was handed over")
        self._package_loaded.wait()
        if self._package_failed:
            raise Cancelled()
        missing = self._loader.receiver.missing()
        if missing:
            raise LostPages(missing)

    # ---- no channel ----

    def _hold(self, text: str) -> None:
        """Report, keep the missing pages missing, and serve what needs no source until one comes.

        Raises:
            Cancelled: the attempt was given up.
            MigrationError, OSError: faults cannot be served any more.
        """
        loader = self._loader
        self._recovery = None
        loader.receiver.no_channel()
        self._host.on_lost(text)
        while True:
            loader.receiver.listen(self._uffd.fd, self._return_path, loader.ram_section_id, self._kick.fd)
            self._kick.take()
            with self._offer_lock:
                offer, self._offer = self._offer, None
            if offer is None:
                continue
            loader.reader, self._return_path, self._recovery = offer
            loader.receiver.new_channel(loader.reader)
            self._host.on_recover()
            return

    def _desensitise(self) -> None:
        """Make RAM plain memory again; may be called twice.

        When every page is received, what is absent is a page of zeroes, and the kernel's own one is right.
        """
        if self._is_plain:
            return
        self._is_plain = True
        for block in self._loader.blocks:
            self._uffd.unregister(block.host_address, block.length_bytes)
        self._uffd.close()
        self._ram.set_read_guard(None)
