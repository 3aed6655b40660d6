"""Recovery at the destination: what a source may say on the new channel of a paused postcopy.

    SOURCE                              DESTINATION (mig/listen, which goes on to serve faults)
    X_ASK name  --------------------->  X_FATE                     between two Pageferries, and first
    RECV_BITMAP block, for each  ---->  RECV_BITMAP, the block's received map
    RESUME  ------------------------->  RESUME_ACK; every page that somebody waits for is asked for again
    PART ...

Until RESUME nothing is asked for, as in QEMU. Anything else breaks the new channel, and we are paused again.
Source: QEMU 7.2 migration/savevm.c (loadvm_handle_recv_bitmap, loadvm_postcopy_handle_resume).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vmm.migration import commands
from vmm.migration.errors import PeerError, StreamMismatch
from vmm.migration.peer import Fate
from vmm.migration.postcopy_state import PostcopyEvent
from vmm.migration.return_path import FateReply, MessageWriter, Pong, RecvBitmapReply, ResumeAck
from vmm.migration.stream import read_record

if TYPE_CHECKING:
    from vmm.migration.byte_stream import StreamReader
    from vmm.migration.hand_over import Orders
    from vmm.migration.loader import Loader
    from vmm.migration.page_pump.receiver import ReturnPathWriter
    from vmm.migration.postcopy_state import PostcopyStateMachine
    from vmm.migration.stream import Record

__all__ = ["DestinationRecovery", "answer_questions"]

log = logging.getLogger(__name__)


class DestinationRecovery:
    """One handshake on one new channel. Used by mig/listen alone."""

    def __init__(
        self, loader: Loader, postcopy: PostcopyStateMachine, return_path: ReturnPathWriter, orders: Orders
    ) -> None:
        self._loader = loader
        self._postcopy = postcopy
        self._return_path = return_path
        self._orders = orders
        self._messages = MessageWriter()
        self._has_asked = loader.migration is None

    def obey(self, record: Record) -> bool:
        """Answer one record; True if it was RESUME: now `resume`.

        Raises:
            StreamMismatch: another migration's source, or a RAMBlock that there is not.
            PeerError: nothing that may be said here.
            OSError, Cancelled: the channel failed.
        """
        match record:
            case commands.Ask(migration):
                fate = self._orders.fate(migration)
                self._return_path.send(self._messages.write(FateReply(fate)))
                self._has_asked |= migration == self._loader.migration
            case commands.RecvBitmap(block):
                self._check_asked()
                self._postcopy.handle(PostcopyEvent.RECV_BITMAP)
                self._send_bitmap(block)
            case commands.PageChecksums():
                self._check_asked()
                self._loader.receiver.expect_checksums()
            case commands.PostcopyResume():
                self._check_asked()
                self._postcopy.handle(PostcopyEvent.RESUME)
                return True
            case _:
                raise PeerError(f"{type(record).__name__} in the middle of recovery")
        return False

    def _check_asked(self) -> None:
        """Two Pageferries know their migration by its name; its pages come from nobody else."""
        if not self._has_asked:
            assert self._loader.migration is not None, "a migration without a name has no need to ask"
            name = self._loader.migration.hex()
            raise StreamMismatch(
                "Source of the recovery", expected=f"that of migration {name}", got="another"
            )

    def _send_bitmap(self, block: str) -> None:
        received = self._loader.receiver.received
        if block not in received:
            raise StreamMismatch("RECV_BITMAP block", expected="one of " + ", ".join(received), got=block)
        raw = received[block].to_bytes()
        self._return_path.send(self._messages.write(RecvBitmapReply(block, raw)))

    def resume(self) -> None:
        """Agree, and ask for what is wanted. Raises OSError, Cancelled."""
        self._return_path.send(self._messages.write(ResumeAck()))
        asked = self._loader.receiver.ask_again(self._return_path)
        log.info("recovery is agreed; %d pages were asked for again", asked)


def answer_questions(reader: StreamReader, return_path: ReturnPathWriter, orders: Orders) -> Fate:
    """Where there is nothing to recover: tell a Pageferry source what became of its guest; the last answer.

    Raises:
        PeerError, StreamError: something else than X_ASK was said, or nothing.
        OSError, Cancelled: the channel failed.
    """
    messages = MessageWriter()
    while True:
        match read_record(reader):
            case commands.Ping(value):
                return_path.send(messages.write(Pong(value)))
            case commands.Ask(migration):
                fate = orders.fate(migration)
                return_path.send(messages.write(FateReply(fate)))
                reader.peek(1)  # the source reads it before it closes
                return fate
            case record:
                raise PeerError(f"{type(record).__name__}, and there is nothing to recover here")
