"""Shows a migration stream, Pageferry's or stock QEMU's, record by record: `pageferry-stream FILE|-`.

    pageferry-stream FILE               one line for each record, with its offset
    pageferry-stream --pages FILE       and one for each page
    pageferry-stream --json FILE        device state as JSON instead
    pageferry-stream --extract DIR FILE the RAMBlocks, the device state and the vmdescription as files

`-` is the standard input. A broken stream is shown up to the damage; the last line says where it breaks and
what was expected there, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import mmap
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import IO, Any

from tools.stream_walk import Bytes, Item, StreamBroken, walk
from vmm.migration import wire
from vmm.migration.ram_records import MemSize
from vmm.migration.wire import PAGE_SIZE_BYTES
from vmm.migration.xbzrle import decode

__all__ = ["Extracted", "main"]

UNREADABLE = 2


class Extracted:
    """A folder for what a stream holds; pages become sparse files."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def blocks(self, sizes: MemSize) -> None:
        """A file for each RAMBlock, as long as the block."""
        for name, length in sizes.blocks:
            self._files[name] = open(self._folder / f"{_file_name(name)}.ram", "w+b")  # noqa: SIM115 - `close`
            self._files[name].truncate(length)

    def page(self, block: str, offset: int, data: bytes) -> None:
        """The newest content of a page; a page that comes again replaces the older one."""
        file = self._files[block]
        file.seek(offset)
        file.write(data)

    def difference(self, block: str, offset: int, encoded: bytes) -> None:
        """The newest content of a page, from what was there before. Raises IllegalRecord."""
        file = self._files[block]
        file.seek(offset)
        self.page(block, offset, decode(encoded, file.read(PAGE_SIZE_BYTES)))

    def write(self, name: str, content: Any) -> None:
        """One JSON file."""
        (self._folder / name).write_text(json.dumps(content, indent=2) + "\n")

    def close(self) -> None:
        """Everything is on disk."""
        for file in self._files.values():
            file.close()


def _file_name(block: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in block).lstrip(".") or "_"


def jsonable(value: Any) -> Any:
    """Values of a section as JSON has them: bytes in hexadecimal digits."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: jsonable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [jsonable(each) for each in value]
    return value


def _print(items: Iterable[Item]) -> Iterable[Item]:
    for item in items:
        print(f"{item.offset:>12}  {'  ' * item.depth}{item.kind} {item.text}".rstrip())
        yield item


def _open(name: str) -> IO[bytes]:
    """The stream as a file; the standard input goes to a temporary one, since some of it is read twice."""
    if name != "-":
        return open(name, "rb")
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    shutil.copyfileobj(sys.stdin.buffer, spool)
    spool.flush()
    return spool


def _map(file: IO[bytes]) -> Bytes:
    if file.seek(0, 2) == 0:
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _run(data: Bytes, options: argparse.Namespace) -> int:
    extracted = Extracted(options.extract) if options.extract else None
    devices: dict[str, Any] = {}
    description: dict[str, Any] | None = None
    status = 0
    items: Iterable[Item] = walk(data, extracted, each_page=options.pages)
    try:
        for item in items if options.json else _print(items):
            if item.section:
                devices[item.section] = jsonable(item.values)
            if item.kind == wire.RecordType.VMDESCRIPTION.name:
                description = item.values
    except StreamBroken as broken:
        print(broken, file=sys.stderr)
        status = 1
    if options.json:
        print(json.dumps(devices, indent=2))
    if extracted is not None:
        extracted.write("devices.json", devices)
        if description is not None:
            extracted.write("vmdescription.json", description)
        extracted.close()
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit status: 1 for a broken stream, 2 if it cannot be read at all."""
    parser = argparse.ArgumentParser(prog="pageferry-stream", description="Show a migration stream.")
    parser.add_argument("file", metavar="FILE", help="the stream, - for the standard input")
    parser.add_argument("--pages", action="store_true", help="one line for each page, too")
    parser.add_argument(
        "--json", action="store_true", help="print the device state as JSON, and nothing else"
    )
    parser.add_argument(
        "--extract", metavar="DIR", type=pathlib.Path, help="write RAM and device state there"
    )
    options = parser.parse_args(arguments)
    try:
        with _open(options.file) as file:
            return _run(_map(file), options)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has seen enough
        return 0
    except OSError as error:
        print(f"pageferry-stream: {options.file}: {error.strerror or error}", file=sys.stderr)
        return UNREADABLE


if __name__ == "__main__":
    raise SystemExit(main())
