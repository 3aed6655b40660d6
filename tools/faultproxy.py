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
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tools.faultproxy_connection import Connection
from tools.faultproxy_rules import Direction, Plan, Rule, RuleError, parse_rule, parse_script
from tools.faultproxy_sockets import close_with_reset, listening_socket, to_address
from vmm.errors import PageferryError
from vmm.migration.uri import UnixAddress

__all__ = ["FaultProxy", "main"]


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
        self._listen = to_address(listen)
        self._connect = to_address(connect)
        self._rules = list(parse_script(script))
        self._seed = seed
        self._say = say
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: list[Connection] = []
        self._refusing = False
        self.ended = asyncio.Event()
        """Somebody said `quit`."""

    async def start(self) -> None:
        """Listen. Raises OSError."""
        self._listener = listening_socket(self._listen)
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

    def _each(self, act: Callable[[Connection], None]) -> None:
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
                close_with_reset(client)
                continue
            number = len(self._connections) + 1
            connection = Connection(number, client, self._plan(number), self._say)
            self._connections.append(connection)
            connection.start(self._connect)

    def _plan(self, number: int) -> dict[Direction, Plan]:
        return {direction: Plan(self._rules, number, direction, self._seed) for direction in Direction}


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
