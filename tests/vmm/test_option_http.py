"""-http: addresses, and what is refused because others could reach it."""

from __future__ import annotations

import pytest

from vmm.errors import OptionError
from vmm.options import parse_command_line


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080, None)),
        ("localhost:0", ("127.0.0.1", 0, None)),
        (":80", ("127.0.0.1", 80, None)),
        ("[::1]:80", ("::1", 80, None)),
        ("127.9.9.9:80", ("127.9.9.9", 80, None)),
        ("192.0.2.1:80,public=on", ("192.0.2.1", 80, None)),
        ("0.0.0.0:80,public=on", ("0.0.0.0", 80, None)),
        ("unix:/run/a,,b", ("", 0, "/run/a,b")),
    ],
)
def test_addresses(text: str, where: tuple[str, int, str | None]) -> None:
    http = parse_command_line(["-http", text]).http
    assert http is not None
    assert (http.host, http.port, http.path) == where
    assert http.option == f"-http {text}"


def test_the_rest() -> None:
    http = parse_command_line(["-http", "unix:/s,token=/t,hosts=VM.example/proxy:8443"]).http
    assert http is not None
    assert http.token_path == "/t"
    assert http.allowed_hosts == {"vm.example", "proxy:8443"}
    assert parse_command_line([]).http is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-http", "0.0.0.0:80"], "Others can reach the address 0.0.0.0: use 127.0.0.1, or add public=on"),
        (["-http", "[::]:80"], "Others can reach the address ::"),
        (["-http", "192.0.2.1:80,public=off"], "Others can reach"),
        (["-http", "vm.example:80,public=on"], "Expected an IP address or localhost, got 'vm.example'"),
        (["-http", "8080"], "expected HOST:PORT or unix:PATH"),
        (["-http", "127.0.0.1:x"], "expected HOST:PORT or unix:PATH"),
        (["-http", "127.0.0.1:65536"], "expected HOST:PORT or unix:PATH"),
        (["-http", "unix:"], "has 0 bytes, expected 1 to 107"),
        (["-http", "unix:/" + "x" * 107], "has 108 bytes, expected 1 to 107"),
        (["-http", ":80,tokne=x"], "Invalid parameter 'tokne'"),
        (["-http", ":80", "-http", ":81"], "Only one is possible"),
    ],
)
def test_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("[", r"\[")):
        parse_command_line(arguments)
