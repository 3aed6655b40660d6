"""Migration URIs: what they mean, and QEMU's words for those that mean nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.migration.errors import MigrationRefused
from vmm.migration.status import Role
from vmm.migration.uri import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
    parse_uri,
)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("tcp:127.0.0.1:4444", TcpAddress("127.0.0.1", "4444")),
        ("tcp:localhost:0", TcpAddress("localhost", "0")),
        ("tcp::4444", TcpAddress("", "4444")),
        ("tcp:[::1]:65535", TcpAddress("::1", "65535")),
        ("tcp:h:migration", TcpAddress("h", "migration")),
        ("tcp:h:1,ipv4", TcpAddress("h", "1", ipv4=True)),
        ("tcp:h:1,ipv4=off,ipv6=on", TcpAddress("h", "1", ipv4=False, ipv6=True)),
        ("unix:/tmp/a,b=c", UnixAddress("/tmp/a,b=c")),
        ("unix:" + "x" * 107, UnixAddress("x" * 107)),
        ("fd:mig", FdAddress("mig")),
        ("fd:7", FdAddress("7")),
        ("exec:cat > /tmp/x", ExecAddress("cat > /tmp/x")),
        ("file:/tmp/x", FileAddress("/tmp/x")),
        ("file:a,b", FileAddress("a,b")),
        ("file:/tmp/x,offset=4096", FileAddress("/tmp/x", 4096)),
        ("file:/tmp/x,offset=0x1b", FileAddress("/tmp/x", 0x1B)),
        ("file:/tmp/x,offset=1M", FileAddress("/tmp/x", 1 << 20)),
        ("file:/tmp/x,offset=1,offset=2k", FileAddress("/tmp/x,offset=1", 2048)),
    ],
)
def test_addresses(uri: str, address: Address, role: Role) -> None:
    assert parse_uri(uri, role) == address


def test_a_descriptor_by_number_and_by_name() -> None:
    assert FdAddress("7").number == 7
    assert FdAddress("mig7").number is None
    assert FdAddress("٣").number is None


NO_PROTOCOL = "Parameter 'uri' expects a valid migration protocol"


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("", NO_PROTOCOL),
        ("tcp", NO_PROTOCOL),
        ("zzz:1", NO_PROTOCOL),
        ("vsock:3:1", NO_PROTOCOL),
        ("rdma:a:1", NO_PROTOCOL),
        ("TCP:a:1", NO_PROTOCOL),
        ("tcp:127.0.0.1", "error parsing address '127.0.0.1'"),
        ("tcp:", "error parsing address ''"),
        ("tcp:h:", "error parsing address 'h:'"),
        ("tcp::", "error parsing port in address ':'"),
        ("tcp:[::1:44", "error parsing IPv6 address '[::1:44'"),
        ("tcp:[::1]", "error parsing IPv6 address '[::1]'"),
        ("tcp:h:65536", "error parsing address 'h:65536': port 65536 is not between 0 and 65535"),
        ("tcp::-1", "error parsing port in address ':-1': port -1 is not between 0 and 65535"),
        ("tcp:h:1,ipv4=maybe", "error parsing 'ipv4' flag '=maybe'"),
        ("tcp:h:1,ipv4=", "error parsing 'ipv4' flag '='"),
        ("tcp:h:1,foo=1", "Unknown option 'foo' in address 'h:1,foo=1', expected ipv4 or ipv6"),
        ("tcp:" + "h" * 256 + ":1", "host name is too long: 256 characters, must be less than 256"),
        ("unix:", "invalid Unix socket address"),
        (
            "unix:/" + "x" * 107,
            f"UNIX socket path '/{'x' * 107}' is too long: 108 bytes, must be less than 108 bytes",
        ),
        (
            "unix:/" + "é" * 54,
            f"UNIX socket path '/{'é' * 54}' is too long: 109 bytes, must be less than 108 bytes",
        ),
        ("fd:", "File descriptor named '' has not been found"),
        ("exec: ", "exec: expects a command, as in exec:cat>FILE"),
        ("file:", "file: expects a path, as in file:/tmp/vm.state"),
        ("file:,offset=1", "file: expects a path, as in file:/tmp/vm.state"),
        ("file:x,offset=", "file URI has bad offset ''"),
        ("file:x,offset=-1", "file URI has bad offset '-1'"),
        ("file:x,offset=1z", "file URI has bad offset '1z'"),
        pytest.param(
            "file:x,offset=" + "1" * 5000,
            "file URI has bad offset '" + "1" * 5000 + "'",
            id="an offset longer than Python reads",
        ),
        ("file:x,offset=9223372036854775808", "file URI has bad offset '9223372036854775808'"),
        ("unix:a\0b", "A migration URI cannot contain a NUL character"),
    ],
)
def test_what_means_nothing_is_refused_in_qemus_words(uri: str, text: str) -> None:
    with pytest.raises(MigrationRefused) as caught:
        parse_uri(uri, Role.SOURCE)
    assert str(caught.value) == text


@pytest.mark.parametrize("uri", ["", "zzz:", "tcp", "rdma:a:1"])
def test_the_destination_names_the_unknown_protocol(uri: str) -> None:
    with pytest.raises(MigrationRefused, match="^unknown migration protocol: " + uri):
        parse_uri(uri, Role.DESTINATION)


SCHEMES = st.sampled_from(["tcp:", "unix:", "fd:", "exec:", "file:", "", "x:"])


@given(SCHEMES, st.text(max_size=40) | st.from_regex(r"\[?[a-f:.\d]*\]?:?\d*(,[a-z=\d]*)*", fullmatch=True))
def test_any_text_is_an_address_or_refused(scheme: str, rest: str) -> None:
    for role in Role:
        try:
            parse_uri(scheme + rest, role)
        except MigrationRefused as error:
            text = str(error)
        else:
            text = "fine"
        assert text
