"""~ One client's QMP session without I/O: bytes in, requests out; results in, bytes out.

    receive_data, receive_eof -> [ JSON stream -> in-flight queue ] -> next_request
    respond, fail, send_event -> [ ASCII JSON, CRLF ]               -> data_to_send

What this file decides, after the QMP specification and the behaviour of QEMU 7.2:

1. The greeting is the first output. Until `qmp_capabilities` was executed any other command is refused, and
   no event is sent.
2. In-band requests are executed one at a time in the order received, and so are the errors of bad messages.
3. Without the capability `oob` one request is read at a time. With it up to 8 are in flight; among
   them a request with `exec-oob` overtakes the others. When the queue is full, nothing is read.
4. The id is echoed as it came; the error of something that is no request has none.

A caller pairs each request it got from `next_request` with exactly one `respond` or `fail`.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from qmp.errors import CommandNotFound, GenericError, JsonSyntaxError, QmpError
from qmp.json_stream import NOT_READY, JsonStream
from qmp.json_text import dump_json

__all__ = ["MAX_BAD_MESSAGES_IN_A_ROW", "MAX_IN_FLIGHT", "RawJson", "Request", "Session"]

MAX_IN_FLIGHT: Final = 8
"""QEMU's QMP_REQ_QUEUE_LEN_MAX."""
MAX_BAD_MESSAGES_IN_A_ROW: Final = 1000
"""Arbitrary. A client that has sent that many and no command between speaks another protocol."""
_BAD_MESSAGES_A_TURN: Final = 100
"""Looked at in one `next_request`: some milliseconds' work."""
NEGOTIATION: Final = "qmp_capabilities"
_NO_ID: Final = object()


class RawJson(str):
    """A result that is JSON text already, ASCII and on one line."""


@dataclass(slots=True, eq=False)
class Request:
    """A well-formed command object. Its name and arguments have not been checked against any schema."""

    name: str
    arguments: dict[str, Any]
    oob: bool = False
    id: Any = field(default=_NO_ID, repr=False)


class Session:
    """The protocol state of one client."""

    def __init__(self, greeting: dict[str, Any], *, pretty: bool = False) -> None:
        """`greeting` is the value of the member `QMP`: version and capabilities."""
        self._stream = JsonStream()
        self._pretty = pretty
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._queue: deque[Request | tuple[Any, QmpError]] = deque()
        self._urgent: deque[Request] = deque()
        self._running: Request | None = None
        self._bad_in_a_row = 0
        self._bad_in_total = 0
        self._is_paused = False
        self._input_ended = False
        self.negotiated = False
        self.oob_enabled = False
        self._offered = greeting["capabilities"]
        self._write_object({"QMP": greeting})

    # Section: input

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the client. See `wants_data` for when not to."""
        if not self._input_ended:
            self._stream.feed(data)

    def receive_eof(self) -> None:
        """The client will send no more; requests already received are still answered."""
        self._stream.feed_eof()
        self._input_ended = True

    @property
    def wants_data(self) -> bool:
        """Whether more input is welcome: the queue is not full, and all input was looked at."""
        return not self._input_ended and not self._is_full()

    @property
    def is_mid_message(self) -> bool:
        """Once all input was looked at: whether the last message is not over (for transports with frames)."""
        return self._stream.is_mid_message

    @property
    def is_finished(self) -> bool:
        """Whether no more can come and, after `next_request` gave None, everything was answered."""
        return self._input_ended and self._running is None and not self._queue and not self._urgent

    @property
    def is_paused(self) -> bool:
        """Whether, after `next_request` gave None, another call goes on: it stopped to give others time."""
        return self._is_paused

    @property
    def has_waiting(self) -> bool:
        """Whether `next_request` would find something to look at."""
        return bool(self._urgent or self._queue) or self._stream.has_unread

    def next_request(self) -> Request | None:
        """The next request to execute now, or None until more input or a response comes; see `is_paused`."""
        self._is_paused = False
        bad_before = self._bad_in_total
        while True:
            if self._urgent:
                return self._urgent.popleft()
            if self._running is None and self._queue:
                item = self._queue.popleft()
                if isinstance(item, Request):
                    self._running = item
                    return item
                self._refuse(*item)
                continue
            if self._bad_in_total - bad_before >= _BAD_MESSAGES_A_TURN:
                self._is_paused = True
                return None
            if self._is_full() or not self._read_one():
                return None

    def _is_full(self) -> bool:
        waiting = len(self._queue) + (self._running is not None)
        return waiting >= (MAX_IN_FLIGHT if self.oob_enabled else 1)

    def _read_one(self) -> bool:
        """Move one message from the input to the queues; False if there is no whole one."""
        message = self._stream.next_message()
        if message is NOT_READY:
            self._is_paused = self._stream.is_paused
            if not self._stream.is_hopeless:
                return False
            self._read_no_more()  # its error was sent when it began
            return True
        try:
            if isinstance(message, JsonSyntaxError):
                raise message
            if type(message) is not dict:
                raise GenericError("QMP input must be a JSON object")
            request = self._check(message)
        except QmpError as error:
            self._take_bad(message, error)
            return True
        self._bad_in_a_row = 0
        (self._urgent if request.oob else self._queue).append(request)
        return True

    def _take_bad(self, message: Any, error: QmpError) -> None:
        """Queue the error of something that is no request; an out-of-band one is answered at once."""
        if type(message) is not dict:
            self._queue.append((_NO_ID, error))
        elif "exec-oob" in message and "execute" not in message:
            self._refuse(message.get("id", _NO_ID), error)
        else:
            self._queue.append((message.get("id", _NO_ID), error))
        self._bad_in_a_row += 1
        self._bad_in_total += 1
        if self._bad_in_a_row >= MAX_BAD_MESSAGES_IN_A_ROW:
            self._read_no_more()
            why = f"{MAX_BAD_MESSAGES_IN_A_ROW} bad messages in a row"
            self._queue.append((_NO_ID, GenericError(f"This is not QMP: {why}, closing the connection")))

    def _read_no_more(self) -> None:
        self._stream = JsonStream()
        self._input_ended = True
        self._is_paused = False

    def _check(self, message: dict[str, Any]) -> Request:
        """The request in a command object; errors as QEMU's qmp_dispatch_check_obj gives them."""
        name, key, arguments = None, None, {}
        for member, value in message.items():
            if member == "execute" or (member == "exec-oob" and self.oob_enabled):
                if type(value) is not str:
                    raise GenericError(f"QMP input member '{member}' must be a string")
                if key is not None:
                    raise GenericError("QMP input member 'execute' clashes with 'exec-oob'")
                name, key = value, member
            elif member == "arguments":
                if type(value) is not dict:
                    raise GenericError("QMP input member 'arguments' must be an object")
                arguments = value
            elif member != "id":
                raise GenericError(f"QMP input member '{member}' is unexpected")
        if name is None:
            raise GenericError("QMP input lacks member 'execute'")
        return Request(name, arguments, key == "exec-oob", message.get("id", _NO_ID))

    # Section: negotiation

    def check_stage(self, request: Request) -> None:
        """Refuse any command but `qmp_capabilities` before the negotiation is complete."""
        if not self.negotiated and request.name != NEGOTIATION:
            raise CommandNotFound(f"Expecting capabilities negotiation with '{NEGOTIATION}'")

    def negotiate(self, enable: list[str]) -> None:
        """Execute `qmp_capabilities`: events and commands flow from here on.

        Raises:
            CommandNotFound: it was done before.
            GenericError: a capability was not offered in the greeting; nothing is enabled.
        """
        if self.negotiated:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        for name in enable:
            if name not in self._offered:
                raise GenericError(f"Capability {name} not available")
        self.oob_enabled = "oob" in enable
        self.negotiated = True

    # Section: output

    def respond(self, request: Request, result: Any) -> None:
        """Send the result of a request; None is the empty object.

        Raises:
            TypeError, ValueError: the result is not JSON; nothing was sent, `fail` is still due.
        """
        if self._pretty:
            value = json.loads(result) if type(result) is RawJson else result
            self._write_object({"return": {} if value is None else value}, request.id)
        else:
            text = "{}" if result is None else result if type(result) is RawJson else dump_json(result)
            self._write_text('{"return": ' + text, request.id)
        self._done(request)

    def fail(self, request: Request, error: QmpError) -> None:
        """Send the error of a request."""
        self._refuse(request.id, error)
        self._done(request)

    def send_event(self, event: dict[str, Any], encoded: bytes) -> None:
        """Send an event, given as object and as its line; dropped before the negotiation."""
        if not self.negotiated:
            return
        if self._pretty:
            self._write_object(event)
        else:
            self._write(encoded)

    @property
    def unsent_bytes(self) -> int:
        """Output that waits for `data_to_send`."""
        return self._out_bytes

    def data_to_send(self) -> bytes:
        """The output since the last call."""
        data = b"".join(self._out)
        self._out.clear()
        self._out_bytes = 0
        return data

    def _done(self, request: Request) -> None:
        if request is self._running:
            self._running = None

    def _refuse(self, id_: Any, error: QmpError) -> None:
        value = {"error": {"class": error.error_class, "desc": str(error)}}
        self._write_object(value if id_ is _NO_ID else {"id": id_, **value})

    def _write_object(self, value: dict[str, Any], id_: Any = _NO_ID) -> None:
        if id_ is not _NO_ID:
            value = {**value, "id": id_}
        self._write(dump_json(value, pretty=self._pretty).encode("ascii") + b"\r\n")

    def _write_text(self, text: str, id_: Any) -> None:
        if id_ is not _NO_ID:
            text = f'{text}, "id": {id_ if type(id_) is int else dump_json(id_)}'
        self._write((text + "}\r\n").encode("ascii"))

    def _write(self, data: bytes) -> None:
        self._out.append(data)
        self._out_bytes += len(data)
