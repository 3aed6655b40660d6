"""The human monitor's texts, recorded from QEMU 7.2.22 where stock has the same command."""

from __future__ import annotations

import pathlib
from uuid import UUID

import pytest

from tests.vmm.control.fakes import fake_vm
from vmm.control.human_info import parameters_text
from vmm.migration.params import PARAMETERS, Capability, Parameters

TRY = 'Try "help {}" for more information\r\n'

CASES = [
    ("", ""),
    ("  ", ""),
    ("info status", "VM status: paused (prelaunch)\r\n"),
    ("info name", ""),
    ("info uuid", "00000000-0000-0000-0000-000000000000\r\n"),
    ("info version", "7.2.22pageferry-0.1.0\r\n"),
    ("info kvm", "kvm support: disabled\r\n"),
    ("info cpus", "* CPU #0: thread_id=4711\r\n"),
    ("info chardev", "mon0: filename=unix:/s,server=on\r\n"),
    ("info memory_size_summary", "base memory: 1048576\r\nplugged memory: 0\r\n"),
    ("info foo", "unknown command: 'info foo'\r\n"),
    ("info mig", "unknown command: 'info mig'\r\n"),
    ("sys", "unknown command: 'sys'\r\n"),
    ('"info" "status"', "unknown command: '\"info\"'\r\n"),
    ("help foo", "unknown command: 'foo'\r\n"),
    ("help foo bar", "unknown command: 'foo'\r\n"),
    ("help stop", "stop|s  -- stop emulation\r\n"),
    ("help cont", "cont|c  -- resume emulation\r\n"),
    ("help c", "cont|c  -- resume emulation\r\n"),
    ("help quit", "quit|q  -- quit the emulator\r\n"),
    ("help info status", "info status  -- show the current VM status (running|paused)\r\n"),
    (
        "help migrate",
        "migrate [-d] [-b] [-i] [-r] uri -- migrate to URI (using -d to not wait for completion)\r\n"
        "\t\t\t -b for migration without shared storage with full copy of disk\r\n"
        "\t\t\t -i for migration without shared storage with incremental copy of disk (base image shared "
        "between src and destination)\r\n"
        "\t\t\t -r to resume a paused migration\r\n",
    ),
    ("migrate", "migrate: string expected\r\n" + TRY.format("migrate")),
    ("migrate -d", "migrate: string expected\r\n" + TRY.format("migrate")),
    ("migrate -d -r", "migrate: string expected\r\n" + TRY.format("migrate")),
    ("migrate -z foo", "migrate: unsupported option -z\r\n" + TRY.format("migrate")),
    ('migrate "foo', "migrate: string expected\r\n" + TRY.format("migrate")),
    (
        "migrate -dd x:",
        "migrate: extraneous characters at the end of line\r\n" + TRY.format("migrate"),
    ),
    ("migrate -d zzz:1", "Error: Parameter 'uri' expects a valid migration protocol\r\n"),
    ("quit now", "quit|q: extraneous characters at the end of line\r\n" + TRY.format("quit")),
    (
        "info status foo",
        "status: extraneous characters at the end of line\r\n" + TRY.format("info status"),
    ),
    (
        "migrate_set_capability",
        "migrate_set_capability: string expected\r\n" + TRY.format("migrate_set_capability"),
    ),
    ("migrate_set_capability foo on", "Error: invalid parameter value: foo\r\n"),
    (
        "migrate_set_capability events maybe",
        "Expected 'on' or 'off'\r\n" + TRY.format("migrate_set_capability"),
    ),
    ("migrate_set_capability x-postcopy-ram on", ""),
    ("migrate_set_capability postcopy-ram off", ""),
    ("migrate_set_parameter foo 1", "Error: invalid parameter value: foo\r\n"),
    ("migrate_set_parameter max-bandwidth 100k", ""),
    ("migrate_set_parameter max-bandwidth 5x", "Error: Invalid size 5x\r\n"),
    (
        "migrate_set_parameter downtime-limit 99999999",
        "Error: Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms\r\n",
    ),
    (
        "migrate_set_parameter multifd-compression foo",
        "Error: Parameter 'multifd-compression' does not accept value 'foo'\r\n",
    ),
    (
        "migrate_set_parameter compress-wait-thread maybe",
        "Error: Parameter 'compress-wait-thread' expects 'on' or 'off'\r\n",
    ),
    ("migrate_incoming foo", "Error: '-incoming' was not specified on the command line\r\n"),
    ("migrate_continue active", "Error: Migration not in expected state: none\r\n"),
    ("migrate_continue zz", "Error: invalid parameter value: zz\r\n"),
    (
        "migrate_start_postcopy",
        "Error: Enable postcopy with migrate_set_capability before the start of migration\r\n",
    ),
    ("migrate_pause", "Error: migrate-pause is currently only supported during postcopy-active state\r\n"),
    ("migrate_recover x", "Error: Migrate recover can only be run when postcopy is paused.\r\n"),
    ("migrate_cancel", ""),
    ("c", ""),
    ("info status", "VM status: running\r\n"),
    ("stop", ""),
    ("info status", "VM status: paused\r\n"),
    ("system_reset", ""),
    ("system_powerdown", ""),
    ("nmi", ""),
    ("nmi x", "nmi: extraneous characters at the end of line\r\n" + TRY.format("nmi")),
    ("help nmi", "nmi  -- inject an NMI\r\n"),
    ("info balloon", "Error: No balloon device has been activated\r\n"),
    ("help info balloon", "info balloon  -- show balloon information\r\n"),
    ("balloon 5", "Error: No balloon device has been activated\r\n"),
    ("balloon", "unexpected end of expression\r\n" + TRY.format("balloon")),
    ("sendkey", "sendkey: string expected\r\n" + TRY.format("sendkey")),
    ("sendkey a zz", "invalid char 'z' in expression\r\n" + TRY.format("sendkey")),
    ("memsave", "unexpected end of expression\r\n" + TRY.format("memsave")),
    ("memsave 0 16", "memsave: string expected\r\n" + TRY.format("memsave")),
    ("pmemsave zz 1 x", "invalid char 'z' in expression\r\n" + TRY.format("pmemsave")),
    (
        "help pmemsave",
        "pmemsave addr size file -- save to disk physical memory dump starting at 'addr' of size 'size'\r\n",
    ),
]


def test_recorded_texts() -> None:
    with fake_vm() as vm:
        for line, expected in CASES:
            assert vm.control.human.execute(line) == expected, line


def test_keys_are_refused_by_name() -> None:
    """Stock takes them, and drops them where there is no keyboard."""
    with fake_vm() as vm:
        assert vm.control.human.execute("sendkey ctrl-a 0x10") == "Error: This machine has no keyboard\r\n"


def test_memory_is_saved(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a file"
    with fake_vm() as vm:
        vm.machine.ram.write(0x18, b"hello")
        assert vm.control.human.execute(f'pmemsave 0x18 010 "{path}"') == ""
        assert path.read_bytes() == b"hello\0\0\0"
        assert vm.control.human.execute(f'memsave 0x1018 5 "{path}"') == ""
        assert path.read_bytes() == b"hello"
        refused = vm.control.human.execute(f'pmemsave 0 0x1000001 "{path}"')
        assert refused == "Error: More than 16777216 bytes at once are saved by QMP's command\r\n"
        nowhere = vm.control.human.execute("pmemsave 0 1 /nowhere/x")
        assert nowhere == "Error: Could not open '/nowhere/x': No such file or directory\r\n"


def test_name_and_uuid() -> None:
    with fake_vm() as vm:
        vm.machine.config.name = "foo"
        vm.machine.config.uuid = UUID(int=1)
        assert vm.control.human.execute("info name") == "foo\r\n"
        assert vm.control.human.execute("info uuid") == "00000000-0000-0000-0000-000000000001\r\n"


def test_migrate_passes_flags_and_quoted_uris() -> None:
    with fake_vm() as vm:
        human = vm.control.human
        assert human.execute('migrate -d -r "exec:cat >\\"a b\\""') == ""
        assert vm.migrator.log == [("migrate", 'exec:cat >"a b"', True, False, False)]
        assert "continuing detached" in human.execute("migrate tcp:h:1")


def test_capabilities_and_parameters_are_listed_as_stock_lists_them() -> None:
    with fake_vm() as vm:
        human = vm.control.human
        human.execute("migrate_set_capability x-postcopy-ram on")
        capabilities = human.execute("info migrate_capabilities").split("\r\n")
        assert capabilities[:-1] == [
            f"{each.value}: {'on' if each is Capability.POSTCOPY_RAM else 'off'}" for each in Capability
        ]
        parameters = human.execute("info migrate_parameters").split("\r\n")
        assert parameters[0] == "announce-initial: 50 ms"
        assert "downtime-limit: 300 ms" in parameters
        assert "max-bandwidth: 134217728 bytes/second" in parameters
        assert "tls-creds: ''" in parameters


def test_info_migrate() -> None:
    with fake_vm() as vm:
        human = vm.control.human
        idle = human.execute("info migrate")
        assert idle.startswith("globals:\r\nstore-global-state: on\r\n")
        assert "Migration status" not in idle
        vm.migrator.pretend_completed()
        assert human.execute("info migrate") == idle + (
            "Migration status: completed\r\ntotal time: 303 ms\r\ndowntime: 0 ms\r\nsetup: 3 ms\r\n"
            "transferred ram: 36 kbytes\r\nthroughput: 1.22 mbps\r\nremaining ram: 0 kbytes\r\n"
            "total ram: 0 kbytes\r\nduplicate: 0 pages\r\nskipped: 0 pages\r\nnormal: 0 pages\r\n"
            "normal bytes: 0 kbytes\r\ndirty sync count: 0\r\npage size: 4 kbytes\r\n"
            "multifd bytes: 0 kbytes\r\npages-per-second: 0\r\n"
        )


@pytest.mark.parametrize("line", ["help", "?", "info", "help info"])
def test_help_is_what_qmp_shell_can_complete_from(line: str) -> None:
    with fake_vm() as vm:
        lines = vm.control.human.execute(line).split("\r\n")
        assert lines.pop() == ""
        assert len(lines) > 8
        if "info" in line:
            assert all(len(each.split()) >= 2 and each.startswith("info ") for each in lines)


def test_parameters_are_printed_with_their_units() -> None:
    lines = parameters_text(Parameters().query()).splitlines()
    for line in (
        "announce-initial: 50 ms",
        "announce-rounds: 5",
        "compress-wait-thread: on",
        "max-bandwidth: 134217728 bytes/second",
        "downtime-limit: 300 ms",
        "xbzrle-cache-size: 67108864 bytes",
        "max-postcopy-bandwidth: 0",
        "tls-creds: ''",
    ):
        assert line in lines
    assert len(lines) == len(PARAMETERS)
