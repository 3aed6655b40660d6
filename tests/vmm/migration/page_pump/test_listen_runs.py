"""From LISTEN on pages come in runs that one call places, and who hears of a request answers it."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.requires import requires
from uffd import Mode, Userfaultfd
from vmm.migration.byte_stream import StreamReader, StreamWriter
from vmm.migration.cancel import CancelEvent
from vmm.migration.errors import Cancelled
from vmm.migration.page_pump.receiver import Heard, PageReceiver, ReturnPathWriter
from vmm.migration.page_pump.sender import PageSender
from vmm.migration.ram_records import EndOfBody, Page, RamReader, RamWriter, ZeroPage
from vmm.migration.return_path import MessageWriter, ReqPages
from vmm.ram import RAMBlock
from vmm.vmstate import BytesSource

PAGE = 4096
PAGES = 96
RAM_SECTION = (2).to_bytes(4, "big")
PART, END, FOOTER, EOF = b"\x02", b"\x03", b"\x7e", b"\x00"

pieces = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, 40), st.booleans(), st.booleans()), max_size=8
)


def section(kind: bytes, body: bytes) -> bytes:
    """A ram section with page records."""
    return kind + RAM_SECTION + body + RamWriter().write(EndOfBody()) + FOOTER + RAM_SECTION


def body_of(numbers: list[tuple[int, bool]]) -> bytes:
    """Records of (page, is zero); a page begins with its number plus one."""
    writer = RamWriter()
    return b"".join(
        writer.write(
            ZeroPage("ram", page * PAGE) if zero else Page("ram", page * PAGE, bytes([page + 1]) * PAGE)
        )
        for page, zero in numbers
    )


@given(pieces, st.lists(st.integers(1, 70_000), max_size=12))
def test_runs_are_placed_once_wherever_they_break_off(
    content: list[tuple[int, int, bool, bool]], splits: list[int]
) -> None:
    requires("uffd")
    block = RAMBlock("ram", PAGES * PAGE)
    left, right = socket.socketpair()
    right.setblocking(False)
    cancel = CancelEvent()
    reader = StreamReader(right.fileno(), cancel.fd)
    return_path = ReturnPathWriter(right.fileno(), cancel.fd)
    receiver = PageReceiver([block], reader)
    uffd = Userfaultfd()
    uffd.register(block.host_address, block.length_bytes, Mode.MISSING)
    data, first_came = b"", dict[int, bool]()
    part: list[tuple[int, bool]] = []
    for first, count, zero, ends_section in content:
        part += [(page, zero) for page in range(first, min(first + count, PAGES))]
        if ends_section:
            data += section(PART, body_of(part))
            part = []
        for page in range(first, min(first + count, PAGES)):
            first_came.setdefault(page, zero)
    data += section(END, body_of(part)) + EOF

    def feed() -> None:
        rest = data
        for size in splits:
            left.sendall(rest[:size])
            rest = rest[size:]
        left.sendall(rest)

    feeding = threading.Thread(target=feed)
    feeding.start()
    assert receiver.listen(uffd.fd, return_path, 2) is Heard.END
    feeding.join()
    received = {
        page for first, count in receiver.received["ram"].runs() for page in range(first, first + count)
    }
    assert received == first_came.keys()
    total = sum(min(first + count, PAGES) - first for first, count, _, _ in content)
    assert receiver.struct.duplicates == total - len(first_came)
    uffd.unregister(block.host_address, block.length_bytes)
    uffd.close()
    for page in range(PAGES):
        value = 0 if first_came.get(page, True) else page + 1
        assert block.read(page * PAGE, PAGE) == bytes([value]) * PAGE, page
    return_path.close()
    cancel.close()
    left.close()
    right.close()
    block.close()


def test_who_hears_of_a_request_answers_it_while_the_sender_sleeps() -> None:
    block = RAMBlock("ram", 8 * PAGE)
    block.fill(0, 8 * PAGE, 7)
    left, right = socket.socketpair()
    left.setblocking(False)
    cancel, done = CancelEvent(), CancelEvent()
    writer = StreamWriter(left.fileno(), cancel.fd)
    sender = PageSender([block], writer)
    sender.dirty["ram"].fill(True)
    sender.populated["ram"].fill(True)
    woken: list[bool] = []
    waiting = threading.Thread(target=lambda: woken.append(sender.wait_for_request(done.fd, 60_000)))
    waiting.start()
    while not sender.struct.may_answer:
        pass

    def hear() -> None:
        try:
            sender.read_message(StreamReader(left.fileno(), cancel.fd))
        except Cancelled:
            woken.append(False)

    hearing = threading.Thread(target=hear)
    hearing.start()
    right.sendall(MessageWriter().write(ReqPages("ram", 3 * PAGE, 2 * PAGE)))
    wanted = RamWriter()
    expected = b"".join(wanted.write(Page("ram", page * PAGE, bytes([7]) * PAGE)) for page in (3, 4))
    got = b""
    while len(got) < len(expected):
        got += right.recv(len(expected) - len(got))
    assert got == expected
    assert woken == [], "the sender was not woken"
    assert sender.struct.requested_pages == 2
    sender.wake()
    waiting.join()
    cancel.set()
    hearing.join()
    assert woken == [True, False]
    sender.close()
    for end in (left, right):
        end.close()
    cancel.close()
    done.close()
    block.close()


@settings(max_examples=20)
@given(st.integers(1, 12), st.sets(st.integers(0, PAGES - 1), max_size=20), st.integers(1000, 70_000))
def test_answers_overtake_what_a_full_channel_keeps_waiting(batch: int, wanted: set[int], read: int) -> None:
    """mig/source waits for room between two records; who hears of a request then puts its page there."""
    block = RAMBlock("ram", PAGES * PAGE)
    for page in range(PAGES):
        block.fill(page * PAGE, PAGE, page + 1)
    left, right = socket.socketpair()
    left.setblocking(False)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * PAGE)
    cancel = CancelEvent()
    sender = PageSender([block], StreamWriter(left.fileno(), cancel.fd))
    sender.dirty["ram"].fill(True)
    sender.populated["ram"].fill(True)

    def hear() -> None:
        with contextlib.suppress(Cancelled):
            sender.read_message(StreamReader(left.fileno(), cancel.fd))

    def send() -> None:
        sender.send(PAGES, batch=batch)
        left.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=hear), threading.Thread(target=send)]
    threads[0].start()
    messages = MessageWriter()
    right.sendall(messages.write(ReqPages("ram", (PAGES - 1) * PAGE, PAGE)))
    while not sender.struct.queue_used:
        pass
    threads[1].start()
    while not sender.struct.may_answer and threads[1].is_alive():
        pass
    for page in wanted:
        right.sendall(messages.write(ReqPages("ram", page * PAGE, PAGE)))
    data = b""
    while part := right.recv(read):
        data += part
    source = BytesSource(data)
    reader = RamReader(source, {"ram": PAGES * PAGE})
    pages = []
    while source.peek(1):
        record = reader.read()
        assert isinstance(record, Page)
        assert record.data == bytes([record.offset // PAGE + 1]) * PAGE
        pages.append(record.offset // PAGE)
    assert pages[0] == PAGES - 1, "asked for before anything was sent"
    assert sorted(pages) == list(range(PAGES)), "each once"
    cancel.set()
    for thread in threads:
        thread.join()
    sender.close()
    for end in (left, right):
        end.close()
    cancel.close()
    block.close()


def test_nobody_spins_while_nothing_is_asked_for() -> None:
    """Both loops after a request, then a quarter of a second without one: they sleep in it."""
    requires("uffd")
    block = RAMBlock("ram", 8 * PAGE)
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    cancel = CancelEvent()
    sender = PageSender([block], StreamWriter(left.fileno(), cancel.fd))
    sender.dirty["ram"].fill(True)
    return_path = ReturnPathWriter(right.fileno(), cancel.fd)
    receiver = PageReceiver([block], StreamReader(right.fileno(), cancel.fd))
    uffd = Userfaultfd()
    uffd.register(block.host_address, block.length_bytes, Mode.MISSING)
    cpu_s: list[float] = []

    def until_cancelled(loop: str) -> None:
        try:
            if loop == "listen":
                receiver.listen(uffd.fd, return_path, 2)
            else:
                sender.read_message(StreamReader(left.fileno(), cancel.fd))
        except Cancelled:
            cpu_s.append(sum(resource.getrusage(resource.RUSAGE_THREAD)[:2]))

    threads = [threading.Thread(target=until_cancelled, args=(loop,)) for loop in ("listen", "hear")]
    for thread in threads:
        thread.start()
    guest = threading.Thread(target=lambda: block.read(5 * PAGE, 1, may_wait=True))
    guest.start()  # a page that nobody sends: its request stays in flight
    while not sender.struct.requests:
        pass
    threading.Event().wait(0.25)  # what is measured
    cancel.set()
    for thread in threads:
        thread.join()
    assert max(cpu_s) < 0.05, "a loop that spins takes all of it"
    uffd.zeropage(block.host_address, 8 * PAGE)
    guest.join()
    uffd.unregister(block.host_address, block.length_bytes)
    uffd.close()
    sender.close()
    return_path.close()
    cancel.close()
    left.close()
    right.close()
    block.close()
