"""A proxy that breaks connections on purpose: `pageferry-faultproxy LISTEN CONNECT`, addresses as in a URI.

    pageferry-faultproxy unix:/tmp/wire unix:/tmp/b --rule 'first to-server 1000000 cut'

Puts itself between any client and server of tcp: or unix: and does to each direction of each connection
what the rules say (`faultproxy_rules.py` has all of them), the same again with the same seed. With --control
it takes commands on a unix socket while it runs, one line each, and answers each with one line of JSON:

    rule CONNECTION DIRECTION OFFSET ACTION [ARGUMENT]    one more; offset `now` acts on what is connected
    resume      what is stalled goes on
    clear       forget all rules, also for connections that stand
    refuse      turn new connections away; `accept` takes them again
    status      every connection: is it open, how far is each direction
    quit        end everything

What it does is said on the standard error, a line each, with the connection and the offset.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import signal
import socket
import stat
import struct
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tools.faultproxy_rules import (
    Action,
    Direction,
    Plan,
    Rule,
    RuleError,
    Verb,
    parse_rule,
    parse_script,
)
from vmm.errors import PageferryError
from vmm.migration.status import Role
from vmm.migration.uri import TcpAddress, UnixAddress, parse_uri

__all__ = ["FaultProxy", "main"]

CHUNK_BYTES = 1 << 16
DRAIN_S = 0.2
"""How long what the receiver of a cut direction sends is still taken, and goes nowhere: closed at once, TCP
would send it a reset, and it might lose what came before the cut. The sender is told at once."""
SLICE_S = 0.02
"""A throttled stream comes in so long slices: small enough to look smooth to a postcopy guest."""


class FaultProxy:
    """One proxy. `start`, then `command` at will, then `close`; or use as an async context manager."""

    def __init__(
        self,
        listen: str,
        connect: str,
        script: str = "",
        seed: int | str = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Raises PageferryError for an address that is none, RuleError for a rule that is none."""
        self._listen = _address(listen)
        self._connect = _address(connect)
        self._rules = list(parse_script(script))
        self._seed = seed
        self._say = say
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: list[_Connection] = []
        self._refusing = False
        self.ended = asyncio.Event()
        """Somebody said `quit`."""

    async def start(self) -> None:
        """Listen. Raises OSError."""
        self._listener = _listening_socket(self._listen)
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def __aenter__(self) -> FaultProxy:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def uri(self) -> str:
        """Where to connect to, with the port that was chosen."""
        assert self._listener is not None, "start() was called"
        if isinstance(self._listen, UnixAddress):
            return f"unix:{self._listen.path}"
        host, port = self._listener.getsockname()[:2]
        return f"tcp:{f'[{host}]' if ':' in host else host}:{port}"

    async def close(self) -> None:
        """End every connection and stop listening."""
        if self._accepting is not None:
            self._accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._accepting
        for connection in self._connections:
            await connection.close()
        if self._listener is not None:
            self._listener.close()
            if isinstance(self._listen, UnixAddress):
                pathlib.Path(self._listen.path).unlink(missing_ok=True)

    # ---- commands

    def command(self, line: str) -> dict[str, Any]:
        """What the control socket takes and answers: {"ok": ...} or {"error": text}."""
        word, _, rest = line.strip().partition(" ")
        try:
            match word:
                case "rule":
                    self._add(parse_rule(rest))
                case "resume":
                    self._each(lambda connection: connection.resume())
                case "clear":
                    self._rules.clear()
                    self._each(lambda connection: connection.clear())
                case "refuse" | "accept":
                    self._refusing = word == "refuse"
                case "status":
                    return {"ok": [connection.status() for connection in self._connections]}
                case "quit":
                    self.ended.set()
                case _:
                    raise RuleError(f"there is no command '{word}'")
        except RuleError as error:
            return {"error": str(error)}
        return {"ok": True}

    def _each(self, act: Callable[[_Connection], None]) -> None:
        for connection in self._connections:
            act(connection)

    def _add(self, rule: Rule) -> None:
        if rule.low is not None:
            self._rules.append(rule)
        for connection in self._connections:
            for direction in Direction:
                if rule.applies_to(connection.number, direction):
                    connection.add(direction, rule)

    # ---- connections

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            if self._refusing:
                _reset(client)
                continue
            number = len(self._connections) + 1
            connection = _Connection(number, client, self._plan(number), self._say)
            self._connections.append(connection)
            connection.start(self._connect)

    def _plan(self, number: int) -> dict[Direction, Plan]:
        return {direction: Plan(self._rules, number, direction, self._seed) for direction in Direction}


class _Connection:
    """A client, its server, and a pump for each direction."""

    def __init__(
        self, number: int, client: socket.socket, plans: dict[Direction, Plan], say: Callable[[str], None]
    ) -> None:
        self.number = number
        self._client = client
        self._server: socket.socket | None = None
        self._plans = plans
        self._say = say
        self._rates = dict.fromkeys(Direction, 0.0)
        self._flowing = {direction: asyncio.Event() for direction in Direction}
        self._finished: set[Direction] = set()
        self._receiver: socket.socket | None = None  # of the direction that was cut
        self._task: asyncio.Task[None] | None = None
        for event in self._flowing.values():
            event.set()

    def start(self, target: TcpAddress | UnixAddress) -> None:
        """Connect to the server and begin to pump."""
        self._client.setblocking(False)
        self._task = asyncio.create_task(self._run(target))

    async def _run(self, target: TcpAddress | UnixAddress) -> None:
        try:
            self._server = await _connected_socket(target)
        except OSError as error:
            self._tell(f"no server: {error}")
            _reset(self._client)
            return
        self._tell("open")
        pumps = [asyncio.create_task(self._pump(direction)) for direction in Direction]
        try:
            await asyncio.gather(*pumps)
        finally:
            self._finished = set(Direction)
            for pump in pumps:
                pump.cancel()
            try:
                await asyncio.gather(*pumps, return_exceptions=True)
                await self._close_sockets()
            finally:
                self._client.close()
                self._server.close()
                self._tell("closed")

    async def _close_sockets(self) -> None:
        for end in self._ends(Direction.TO_SERVER):
            if end is not self._receiver:
                end.close()
        if self._receiver is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_drain(self._receiver), DRAIN_S)

    async def close(self) -> None:
        """End it if it stands."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    # ---- what users want

    @property
    def is_open(self) -> bool:
        """Do bytes still pass?"""
        return self._task is not None and not self._task.done() and len(self._finished) < len(Direction)

    def status(self) -> dict[str, Any]:
        """For the control socket."""
        offsets = {direction.value: self._plans[direction].offset for direction in Direction}
        stalled = [direction.value for direction in Direction if not self._flowing[direction].is_set()]
        return {"connection": self.number, "open": self.is_open, **offsets, "stalled": stalled}

    def add(self, direction: Direction, rule: Rule) -> None:
        """One more rule; one for now acts at once. Raises RuleError if its place is past."""
        if not self.is_open:
            return
        if rule.low is None:
            self._act_now(direction, rule.action)
        elif rule.connection or rule.low >= self._plans[direction].offset:
            self._plans[direction].add(rule.low, rule.action)

    def clear(self) -> None:
        """Forget all rules, and what they have set."""
        for direction in Direction:
            self._plans[direction].clear()
            self._rates[direction] = 0.0
        self.resume()

    def resume(self) -> None:
        """What is stalled goes on."""
        for event in self._flowing.values():
            event.set()

    # ---- the pumps

    def _ends(self, direction: Direction) -> tuple[socket.socket, socket.socket]:
        assert self._server is not None
        ends = self._client, self._server
        return ends if direction is Direction.TO_SERVER else ends[::-1]

    async def _pump(self, direction: Direction) -> None:
        loop = asyncio.get_running_loop()
        source, sink = self._ends(direction)
        data = b""
        try:
            while True:
                for step in self._plans[direction].feed(data):
                    if isinstance(step, bytes):
                        await self._pass(direction, sink, step)
                    else:
                        await self._act(direction, step)
                await self._flowing[direction].wait()
                data = await loop.sock_recv(source, CHUNK_BYTES)
                if not data:
                    break
        except OSError:
            self._end_both()  # the one side is gone, and the other is to know
        self._finish(direction)

    async def _pass(self, direction: Direction, sink: socket.socket, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        await self._flowing[direction].wait()
        if direction in self._finished:
            return
        while data and (rate := self._rates[direction]):
            size = max(1, int(rate * SLICE_S))
            await loop.sock_sendall(sink, data[:size])
            data = data[size:]
            await asyncio.sleep(min(size, int(rate) or 1) / rate)
        if data:
            await loop.sock_sendall(sink, data)

    async def _act(self, direction: Direction, action: Action) -> None:
        self._act_now(direction, action)
        if action.verb is Verb.STALL:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(action.argument):
                    await self._flowing[direction].wait()
            self._flowing[direction].set()
        elif action.verb in (Verb.CUT, Verb.RESET):
            await asyncio.get_running_loop().create_future()  # `_stop` has cancelled us

    def _act_now(self, direction: Direction, action: Action) -> None:
        self._tell(f"{direction.value} {self._plans[direction].offset}: {action}")
        match action.verb:
            case Verb.STALL:
                self._flowing[direction].clear()
            case Verb.THROTTLE:
                self._rates[direction] = action.argument or 0.0
            case Verb.HALF_CLOSE:
                self._finish(direction)
            case Verb.RESET:
                for end in self._ends(direction):
                    # What closes it later then sends a reset, and forgets what was still to be sent.
                    with contextlib.suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._stop()
            case Verb.CUT:
                self._receiver = self._ends(direction)[1]
                self._end_both()

    def _finish(self, direction: Direction) -> None:
        """This direction ends; its receiver reads that."""
        if direction not in self._finished:
            self._finished.add(direction)
            with contextlib.suppress(OSError):
                self._ends(direction)[1].shutdown(socket.SHUT_WR)

    def _end_both(self) -> None:
        for direction in Direction:
            self._finish(direction)
        self._stop()

    def _stop(self) -> None:
        """The pumps end, and `_run` closes both sockets."""
        self._finished = set(Direction)
        self.resume()
        assert self._task is not None
        self._task.cancel()

    def _tell(self, text: str) -> None:
        self._say(f"connection {self.number}: {text}")


# ---- sockets


def _address(uri: str) -> TcpAddress | UnixAddress:
    address = parse_uri(uri, Role.SOURCE)
    if not isinstance(address, TcpAddress | UnixAddress):
        raise RuleError(f"expected tcp:HOST:PORT or unix:PATH, got '{uri}'")
    return address


def _listening_socket(address: TcpAddress | UnixAddress) -> socket.socket:
    if isinstance(address, UnixAddress):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(address.path).st_mode):
                os.unlink(address.path)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(address.path)
            listener.listen()
        except OSError:
            listener.close()
            raise
    else:
        host = address.host or "127.0.0.1"
        family = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, int(address.port)), family=family)
    listener.setblocking(False)
    return listener


async def _connected_socket(address: TcpAddress | UnixAddress) -> socket.socket:
    loop = asyncio.get_running_loop()
    where: Any = None
    if isinstance(address, UnixAddress):
        family, where = socket.AF_UNIX, address.path
    else:
        found = await loop.getaddrinfo(address.host or "127.0.0.1", address.port, type=socket.SOCK_STREAM)
        family, where = found[0][0], found[0][4]
    connected = socket.socket(family, socket.SOCK_STREAM)
    connected.setblocking(False)
    try:
        await loop.sock_connect(connected, where)
        if not isinstance(address, UnixAddress):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connected.close()
        raise
    return connected


async def _drain(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while await asyncio.get_running_loop().sock_recv(connected, CHUNK_BYTES):
            pass


def _reset(connected: socket.socket) -> None:
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connected.close()


# ---- the command


async def _serve_control(proxy: FaultProxy, path: str) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):  # a client that leaves, a line without an end
            while line := await reader.readline():
                if line.strip():
                    answer = proxy.command(line.decode("utf-8", "replace"))
                    writer.write(json.dumps(answer).encode() + b"\n")
                    await writer.drain()
        writer.close()

    previous = os.umask(0o177)  # who may use it is who started it
    try:
        return await asyncio.start_unix_server(serve, path)
    finally:
        os.umask(previous)


async def _run(options: argparse.Namespace, script: str) -> None:
    proxy = FaultProxy(
        options.listen, options.connect, script, options.seed, lambda text: print(text, file=sys.stderr)
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, proxy.ended.set)
    async with proxy:
        waiting: Awaitable[Any] = proxy.ended.wait()
        print(f"listening on {proxy.uri}", flush=True)
        if options.control is None:
            await waiting
            return
        path = options.control.removeprefix("unix:")
        server = await _serve_control(proxy, path)
        async with server:
            await waiting
        pathlib.Path(path).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 2 if an address or a rule cannot be used."""
    parser = argparse.ArgumentParser(
        prog="pageferry-faultproxy",
        description="Pass connections on, and break them where the rules say.",
        epilog="A rule: CONNECTION DIRECTION OFFSET ACTION [ARGUMENT], such as 'first to-server 1M cut'.",
    )
    parser.add_argument("listen", metavar="LISTEN", help="tcp:HOST:PORT or unix:PATH; port 0: any")
    parser.add_argument("connect", metavar="CONNECT", help="tcp:HOST:PORT or unix:PATH of the server")
    parser.add_argument("--script", metavar="FILE", type=pathlib.Path, help="rules, one a line")
    parser.add_argument("--rule", action="append", default=[], help="one more rule; any number of times")
    parser.add_argument("--seed", default="0", help="chooses the offsets of LOW..HIGH")
    parser.add_argument("--control", metavar="unix:PATH", help="take commands there while it runs")
    options = parser.parse_args(arguments)
    try:
        script = options.script.read_text() + "\n" if options.script else ""
        asyncio.run(_run(options, script + "\n".join(options.rule)))
    except (RuleError, PageferryError, OSError) as error:
        print(f"pageferry-faultproxy: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
