"""The sockets of monitors: whose a file is, and how an address is shown."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmp.address import SocketAddress
from qmp.sockets import OwnFile, open_connection, open_listener


def test_a_file_is_removed_by_its_maker_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("ours")
    ours = OwnFile.at(str(path))
    (tmp_path / "other").write_text("theirs")
    (tmp_path / "other").rename(path)
    ours.unlink()
    assert path.read_text() == "theirs"
    OwnFile.at(str(path)).unlink()
    assert not path.exists()
    ours.unlink()  # harmless


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (SocketAddress.unix("/s", server=True), "unix:/s,server=on"),
        (SocketAddress.tcp("::1", 5), "tcp:[::1]:5"),
        (SocketAddress.tcp("", 5), "tcp::5"),
        (SocketAddress.from_fd(3), "fd:3"),
    ],
)
def test_an_address_is_shown_as_query_chardev_does(address: SocketAddress, text: str) -> None:
    assert address.describe() == text


@pytest.mark.asyncio
async def test_errors_name_the_address(tmp_path: Path) -> None:
    address = SocketAddress.unix(str(tmp_path / "s"))
    with pytest.raises(OSError, match=r"Failed to connect to 'unix:.*/s': No such file"):
        await open_connection(address)
    with pytest.raises(OSError, match="Failed to bind 'unix:/nowhere/s': No such file"):
        await open_listener(SocketAddress.unix("/nowhere/s"))
    with await open_listener(address), await open_connection(address) as connected:
        await asyncio.get_running_loop().sock_sendall(connected, b"x")
