"""The guard's rules by tables, and that nothing at all gets past them without the token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp.http.guard import Guard, Refusal, RequestHead, Route

TOKEN = "secret"
ROUTES = {
    "/": Route(),
    "/stream": Route(("GET",)),
    "/qmp": Route(("GET",), writes=True, websocket=True),
}
GUARD = Guard(ROUTES, TOKEN, frozenset({"vm.example", "proxy.example:8443"}))
OWN = ("Host", "127.0.0.1:8080")
SOCKET = (
    OWN,
    ("Upgrade", "websocket"),
    ("Connection", "keep-alive, Upgrade"),
    ("Sec-WebSocket-Version", "13"),
    ("Authorization", f"Bearer {TOKEN}"),
)
Headers = tuple[tuple[str, str], ...]


def status(
    *headers: tuple[str, str],
    target: str = "/",
    method: str = "GET",
    own: tuple[str, int | None] = ("127.0.0.1", 8080),
) -> int:
    """The status of a refusal, or 0."""
    try:
        GUARD.check(RequestHead(method, target, headers, *own))
    except Refusal as refusal:
        return refusal.status
    return 0


@pytest.mark.parametrize(
    ("host", "own", "expected"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080), 0),
        ("localhost:8080", ("127.0.0.1", 8080), 0),
        ("LocalHost:8080", ("127.0.0.1", 8080), 0),
        ("[::1]:8080", ("::1", 8080), 0),
        ("192.0.2.7:8080", ("192.0.2.7", 8080), 0),
        ("[2001:db8::7]:8080", ("2001:db8::7", 8080), 0),
        ("localhost", ("127.0.0.1", 80), 0),
        ("vm.example", ("127.0.0.1", 8080), 0),
        ("VM.example:1", ("127.0.0.1", 8080), 0),
        ("proxy.example:8443", ("127.0.0.1", 8080), 0),
        ("localhost", ("", None), 0),
        ("localhost", ("127.0.0.1", 8080), 421),
        ("192.0.2.8:8080", ("192.0.2.7", 8080), 421),
        ("proxy.example", ("127.0.0.1", 8080), 421),
        ("proxy.example:1", ("127.0.0.1", 8080), 421),
        ("evil.vm.example", ("127.0.0.1", 8080), 421),
        ("vm.example.", ("127.0.0.1", 8080), 421),
        ("vm.example:x", ("127.0.0.1", 8080), 421),
        ("127.0.0.1:08080", ("127.0.0.1", 8080), 421),
        ("127.0.0.1", ("", None), 421),
        ("", ("", None), 421),
    ],
)
def test_hosts(host: str, own: tuple[str, int | None], expected: int) -> None:
    assert status(("Host", host), own=own) == expected


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://127.0.0.1:8080", 0),
        ("https://127.0.0.1:8080", 0),  # through a proxy that speaks TLS
        ("http://localhost:8080", 403),  # another origin than the one that was called
        ("http://127.0.0.1:8081", 403),
        ("http://127.0.0.1:8080.evil.example", 403),
        ("file://", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_origins(origin: str, expected: int) -> None:
    assert status(OWN, ("Origin", origin)) == expected


@pytest.mark.parametrize(
    ("site", "mode", "expected"),
    [
        ("same-origin", "cors", 0),
        ("none", "navigate", 0),
        ("cross-site", "navigate", 0),  # a link
        ("cross-site", "no-cors", 403),
        ("same-site", "websocket", 403),
        ("cross-site", None, 403),
    ],
)
def test_fetch_metadata(site: str, mode: str | None, expected: int) -> None:
    modes = () if mode is None else (("Sec-Fetch-Mode", mode),)
    assert status(OWN, ("Sec-Fetch-Site", site), *modes) == expected


@pytest.mark.parametrize(
    ("target", "method", "headers", "expected"),
    [
        ("/", "GET", (), 0),
        ("/?a=b", "GET", (), 0),
        ("/", "HEAD", (), 0),
        ("/", "get", (), 405),
        ("/", "POST", (), 405),
        ("/stream", "HEAD", (), 405),
        ("/x", "POST", (), 404),
        ("//", "GET", (), 404),
        ("/.", "GET", (), 404),
        ("/%2f", "GET", (), 404),
        ("*", "OPTIONS", (), 404),
        ("", "GET", (), 404),
        ("/", "GET", (("Content-Length", "0"),), 0),
        ("/", "GET", (("Content-Type", "text/plain"),), 0),
        ("/", "GET", (("Content-Length", "1"),), 415),
        ("/", "GET", (("Content-Length", "1"), ("Content-Type", "text/plain")), 415),
        ("/", "GET", (("Content-Length", "1"), ("Content-Type", "Application/JSON; charset=x")), 413),
        ("/", "GET", (("Transfer-Encoding", "chunked"),), 415),
        ("/", "GET", (("Expect", "100-continue"),), 417),
        ("/", "GET", (("Upgrade", "websocket"),), 400),
        ("/", "GET", (("Upgrade", "h2c"),), 400),
        ("/", "GET", (("content-length", "0"), ("Content-Length", "0")), 400),
        ("/", "GET", (("X-Any", "1"), ("X-Any", "2")), 0),
    ],
)
def test_requests(target: str, method: str, headers: Headers, expected: int) -> None:
    assert status(OWN, *headers, target=target, method=method) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0),
        ({"Authorization": f"bearer  {TOKEN}"}, 0),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Authorization": TOKEN}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": f"Bearer {TOKEN}x"}, 401),
        ({"Authorization": "Bearer sécret"}, 401),
        ({"Authorization": "Bearer \udcff"}, 401),
        ({"Authorization": None}, 401),
        ({"Upgrade": None}, 426),
        ({"Upgrade": "h2c"}, 426),
        ({"Connection": "close"}, 426),
        ({"Connection": None}, 426),
        ({"Sec-WebSocket-Version": "8"}, 426),
        ({"Sec-WebSocket-Version": None}, 426),
        ({"Authorization": None, "Upgrade": None}, 401),  # nothing is learnt without the token
    ],
)
def test_the_socket(changes: dict[str, str | None], expected: int) -> None:
    headers = {**dict(SOCKET), **changes}
    assert status(*[(n, v) for n, v in headers.items() if v is not None], target="/qmp") == expected


def test_refusals_say_how_it_is_done() -> None:
    with pytest.raises(Refusal) as refused:
        GUARD.check(RequestHead("GET", "/qmp", [OWN], "127.0.0.1", 8080))
    assert refused.value.headers == {"WWW-Authenticate": 'Bearer realm="pageferry"'}
    with pytest.raises(Refusal) as refused:
        GUARD.check(RequestHead("PUT", "/", [OWN], "127.0.0.1", 8080))
    assert refused.value.headers == {"Allow": "GET, HEAD"}


def test_the_token_is_not_shown() -> None:
    assert TOKEN not in repr(GUARD)


NAMES = st.sampled_from([name for name, _ in SOCKET] + ["Origin", "Sec-Fetch-Site", "Content-Length", "X"])
VALUES = st.one_of(
    st.text(max_size=20), st.sampled_from([value for _, value in SOCKET if TOKEN not in value])
)


@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "OPTIONS", ""]),
    target=st.one_of(st.text(max_size=10), st.sampled_from(["/qmp", "/qmp?", "//qmp", "/qmp/"])),
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=8),
    token=st.text(max_size=10).filter(lambda text: text.strip() != TOKEN),
)
def test_nothing_gets_to_the_socket_without_the_token(
    method: str, target: str, headers: list[tuple[str, str]], token: str
) -> None:
    offered = [*headers, ("Authorization", f"Bearer {token}")]
    head = RequestHead(method, target, offered, "127.0.0.1", 8080)
    try:
        path = GUARD.check(head)
    except Refusal:
        return
    assert path != "/qmp"
    assert path in ROUTES
