"""A request -> its handler: names, stage, out-of-band permission and arguments are checked first.

A handler takes a `Call` and gives the result, None for the empty object, or an awaitable. It runs on the
loop's thread and must not block. What it raises becomes the reply:

    QmpError                       as it is
    what `explain` has a text for  GenericError with that text: the documented errors of the layers below
    anything else                  GenericError, and a traceback in the log: a bug; the process lives on
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from qmp.errors import CommandNotFound, GenericError, QmpError
from qmp.fds import FdStore
from qmp.fdsets import FdSets
from qmp.schema import CommandSchema, Schema
from qmp.session import Request, Session

__all__ = ["Call", "Client", "Dispatcher", "Handler"]

_log = logging.getLogger(__name__)


_PLAIN: Final = frozenset((type(None), dict, list, str))
"""Results that need no closer look: isawaitable() takes a good part of a short command's time."""


class Client(Protocol):
    """What a handler may know of the client that sent the request."""

    @property
    def session(self) -> Session:
        """The protocol state."""

    @property
    def fds(self) -> FdStore:
        """The descriptors it passed."""


@dataclass(frozen=True, slots=True)
class Call:
    """One command as its handler sees it; the arguments fit the schema."""

    client: Client
    name: str
    arguments: dict[str, Any]


Handler = Callable[[Call], Any]


@dataclass(frozen=True, slots=True)
class _Command:
    schema: CommandSchema
    handler: Handler


class Dispatcher:
    """The table of commands, and what all clients share: `fdsets`."""

    def __init__(
        self,
        schema: Schema,
        version: dict[str, Any],
        *,
        hide_unstable: bool = False,
        explain: Callable[[Exception], str | None] = lambda error: None,
    ) -> None:
        """`version` is the VersionInfo object of the greeting; `explain` knows the errors of lower layers."""
        self.schema = schema
        self.version = version
        self.fdsets = FdSets()
        self.hide_unstable = hide_unstable
        """Whether replies lack what the schema calls unstable."""
        self.before_reply: Callable[[], None] = lambda: None
        """Called before each reply is sent: emits the events that happened before it."""
        self._explain = explain
        self._commands: dict[str, _Command] = {}
        self.executed_count = 0
        """Requests so far, refused ones included."""
        self.failed_count = 0
        """Those of them that were answered by an error."""

    @property
    def greeting(self) -> dict[str, Any]:
        """The value of the greeting's member `QMP`."""
        return {"version": self.version, "capabilities": ["oob"]}

    @property
    def names(self) -> list[str]:
        """The commands that have a handler, in the order they were added."""
        return list(self._commands)

    def register(self, name: str, handler: Handler) -> None:
        """Add the handler of a command.

        Raises:
            KeyError: the schema has no such command.
            ValueError: it has a handler.
        """
        if name in self._commands:
            raise ValueError(f"{name} has a handler")
        self._commands[name] = _Command(self.schema.commands[name], handler)

    def execute(self, client: Client, request: Request) -> Awaitable[None] | None:
        """Execute a request and answer it on the client's session.

        Gives None if that is done, else what to await for it. Never raises; neither does the awaitable.
        """
        session = client.session
        self.executed_count += 1
        try:
            session.check_stage(request)
            command = self._commands.get(request.name)
            if command is None:
                raise CommandNotFound(f"The command {request.name} has not been found")
            if request.oob and not command.schema.oob:
                raise GenericError(f"The command {request.name} does not support OOB")
            command.schema.check_arguments(request.arguments)
            result = command.handler(Call(client, request.name, request.arguments))
            if type(result) not in _PLAIN and inspect.isawaitable(result):
                return self._finish(session, request, command, result)
            self._respond(session, request, command, result)
        except Exception as error:
            self._fail(session, request, error)
        return None

    async def _finish(
        self, session: Session, request: Request, command: _Command, result: Awaitable[Any]
    ) -> None:
        try:
            self._respond(session, request, command, await result)
        except Exception as error:
            self._fail(session, request, error)

    def _respond(self, session: Session, request: Request, command: _Command, result: Any) -> None:
        self.before_reply()
        if self.hide_unstable and (hide := command.schema.hide_unstable) is not None:
            result = hide(result)
        session.respond(request, result)

    def _fail(self, session: Session, request: Request, error: Exception) -> None:
        self.failed_count += 1
        self.before_reply()
        if isinstance(error, QmpError):
            session.fail(request, error)
        elif (text := self._explain(error)) is not None:
            session.fail(request, GenericError(text))
        else:
            _log.error("Command %s failed unexpectedly", request.name, exc_info=error)
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            session.fail(request, GenericError(f"Internal error in command '{request.name}': {what}"))
