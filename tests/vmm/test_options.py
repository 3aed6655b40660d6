"""options: command lines of QEMU's users in, settings out; what is wrong is said with what is accepted."""

from __future__ import annotations

import uuid

import pytest

from vmm.config import BackendConfig, Settings
from vmm.errors import OptionError
from vmm.option_table import GROUPS, OPTIONS
from vmm.options import HelpRequested, _Builder, parse_command_line

MIB = 1 << 20

EVERYTHING = """
-M none,x-dirty-log=sync,accel=kvm:tcg -cpu qemu64,-apic,apic-id=0 -smp 1 -S -no-shutdown -no-reboot
-action panic=pause -kernel k -uuid 00000000-0000-0000-0000-000000000001 -name guest=a,,b,debug-threads=on
-incoming tcp:0:1 -pidfile p -daemonize -compat unstable-output=hide -d migration,qmp -D log -msg timestamp=on
-global migration.x-postcopy-start-time=5 -global kvm-pit.lost_tick_policy=discard
-global driver=migration,property=x-a,value=b --display none -sandbox on,obsolete=deny
-device {"driver":"pvpanic","ioport":7} -device isa-debug-exit,iobase=0xf4,iosize=4
"""


def parse(text: str) -> Settings:
    return parse_command_line(text.split())


def test_defaults() -> None:
    settings = parse("")
    assert settings.machine.machine_type == "microvm"
    assert settings.machine.ram == (BackendConfig("microvm.ram", 128 * MIB),)
    assert (settings.serial, settings.monitors, settings.chardevs) == (None, (), ())


@pytest.mark.parametrize(
    ("text", "ram"),
    [
        ("-M none -m 64", [("ram", 64, False, False)]),
        ("-machine type=microvm -m size=1G", [("microvm.ram", 1024, False, False)]),
        (
            "-object memory-backend-ram,id=a,size=8M -M none,memory-backend=a",
            [("a", 8, False, False)],
        ),
        (
            "-object memory-backend-memfd,id=a,size=8M -M none,memory-backend=a -m 8",
            [("a", 8, True, True)],
        ),
        (
            "-object memory-backend-memfd,id=a,size=8M,share=off -M none -machine memory-backend=a",
            [("a", 8, True, False)],
        ),
        (
            '-M memory-backend=a -object {"qom-type":"memory-backend-ram","id":"a","size":"8M","share":true}',
            [("a", 8, True, True)],
        ),
        (
            "-object memory-backend-ram,id=a,size=8M -object memory-backend-ram,id=b,size=1M "
            "-numa node,memdev=b -numa node,memdev=a",
            [("b", 1, False, False), ("a", 8, False, False)],
        ),
    ],
)
def test_ram(text: str, ram: list[tuple[str, int, bool, bool]]) -> None:
    blocks = parse(text).machine.ram
    assert [(b.name, b.length_bytes // MIB, b.memfd, b.share) for b in blocks] == ram


def test_ram_is_rounded_up_as_qemu_does() -> None:
    assert parse("-m 1025k").machine.ram[0].length_bytes == 1032 << 10


def test_character_backends() -> None:
    settings = parse(
        "-serial unix:/s,server=on,wait=off -qmp unix:/q,server,nowait -qmp tcp:[::1]:44,server=on "
        "-chardev socket,id=m,host=h,port=1 -mon m,mode=control,pretty=on -qmp-pretty stdio"
    )
    chardevs = {chardev.id: chardev for chardev in settings.chardevs}
    assert settings.serial == "serial0"
    assert (chardevs["serial0"].path, chardevs["serial0"].server, chardevs["serial0"].wait) == (
        "/s",
        True,
        False,
    )
    assert chardevs["compat_monitor0"].wait is False
    assert (chardevs["compat_monitor1"].host, chardevs["compat_monitor1"].port) == ("[::1]", 44)
    assert chardevs["compat_monitor1"].wait is True
    assert [(m.chardev, m.pretty) for m in settings.monitors] == [
        ("compat_monitor0", False),
        ("compat_monitor1", False),
        ("m", True),
        ("compat_monitor3", True),
    ]


@pytest.mark.parametrize(
    "text", ["-serial stdio", "-nographic -monitor none", "-chardev stdio,id=c -serial chardev:c"]
)
def test_serial_on_stdio(text: str) -> None:
    settings = parse(text)
    assert [(c.id, c.backend, c.mux, c.signal) for c in settings.chardevs] == [
        (settings.serial, "stdio", False, True)
    ]
    assert settings.monitors == ()


@pytest.mark.parametrize(
    "text",
    [
        "-nographic",
        "-serial mon:stdio",
        "-chardev stdio,id=serial0,mux=on,signal=off -serial chardev:serial0 -mon serial0",
    ],
)
def test_serial_and_monitor_on_stdio(text: str) -> None:
    settings = parse(text)
    assert [(c.id, c.backend, c.mux, c.signal) for c in settings.chardevs] == [
        ("serial0", "stdio", True, False)
    ]
    assert settings.serial == "serial0"
    assert [(m.chardev, m.readline) for m in settings.monitors] == [("serial0", True)]


@pytest.mark.parametrize(
    ("text", "serial", "monitors"),
    [
        ("-nographic -nodefaults", None, []),
        ("-nographic -serial null", "null", ["stdio"]),
        ("-nographic -serial null -monitor null", "null", []),
        ("-nographic -qmp unix:/q,server=on", "stdio", ["socket"]),
        ("-nographic -qmp stdio", None, ["stdio"]),
        ("-monitor unix:/m,server,nowait", None, ["socket"]),
        ("-monitor stdio -serial null", "null", ["stdio"]),
        ("-chardev null,id=a,mux=on -serial chardev:a -mon a -mon a", "null", ["null", "null"]),
    ],
)
def test_who_gets_stdio(text: str, serial: str | None, monitors: list[str]) -> None:
    settings = parse(text)
    backends = {chardev.id: chardev.backend for chardev in settings.chardevs}
    assert backends.get(settings.serial or "") == serial
    assert [backends[monitor.chardev] for monitor in settings.monitors] == monitors


def test_serial_by_device() -> None:
    settings = parse("-chardev null,id=c -device isa-serial,chardev=c -nodefaults")
    assert settings.serial == "c"


def test_the_rest() -> None:
    settings = parse_command_line([*EVERYTHING.split(), "-append", "start=1 end=2"])
    machine = settings.machine
    assert (machine.dirty_log, machine.start_paused, machine.kernel) == ("sync", True, "k")
    assert machine.actions.__dict__ == {"reboot": "shutdown", "shutdown": "pause", "panic": "pause"}
    assert machine.uuid == uuid.UUID(int=1)
    assert (machine.name, settings.debug_threads, machine.append) == ("a,b", True, "start=1 end=2")
    assert (machine.incoming, settings.pidfile, settings.daemonize) == ("tcp:0:1", "p", True)
    assert settings.migration_globals == (("x-postcopy-start-time", "5"), ("x-a", "b"))
    assert len(settings.warnings) == 1
    assert settings.compat == {"unstable-output": "hide"}
    assert (settings.log.items, settings.log.file, settings.log.timestamp) == (
        ("migration", "qmp"),
        "log",
        True,
    )
    assert [(d.driver, d.properties) for d in machine.devices] == [
        ("pvpanic", {"ioport": 7, "events": 3}),
        ("isa-debug-exit", {"iobase": 0xF4, "iosize": 4}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-foo", "-foo: Invalid option"),
        ("-seral stdio", "-seral: Invalid option; did you mean -serial?"),
        ("disk.img", "Unexpected argument 'disk.img'"),
        ("-qmp", "-qmp: Requires an argument"),
        ("-M pc", "-M pc: Unsupported machine type 'pc'; accepted: microvm, none"),
        ("-M none,acpi=off", "Property 'none-machine.acpi' not found"),
        ("-M none,accel=kvm", "Accelerator 'kvm' is not available; accepted: tcg"),
        ("-accel kvm", "Accelerator 'kvm'"),
        ("-cpu host", "CPU model 'host' is not known; there is: qemu64"),
        ("-cpu qemu64,+nonsense", "nonsense"),
        ("-smp 2", "Parameter 'cpus' must be 1"),
        ("-m 512k", "expects 1M to 64G of RAM, got 524288 bytes"),
        ("-m 65G", "expects 1M to 64G"),
        ("-m 64,slots=2", "Parameter 'slots' must be 0"),
        ("-uuid x", "Failed to parse UUID string"),
        ("-object foo,id=a", "Parameter 'qom-type' does not accept value 'foo'"),
        ("-object memory-backend-ram,id=a", "Parameter 'size' is missing"),
        ("-object memory-backend-ram,id=7,size=1M", "expects a letter"),
        ("-object memory-backend-ram,id=a,size=1048577", "multiple of 4096"),
        ("-object memory-backend-ram,id=a,size=1M,prealloc=on", "must be off"),
        ("-object memory-backend-ram,id=a,size=1M -object memory-backend-ram,id=a,size=1M", "already exists"),
        ("-object memory-backend-ram,id=a,size=1M -M memory-backend=a -m 2", "-m: Expected 1048576 bytes"),
        ("-M memory-backend=a", "Memory backend 'a' not found"),
        ("-M memory-backend=a -numa node,memdev=a", "Cannot be combined"),
        ("-numa node", "Parameter 'memdev' is missing"),
        ("-object memory-backend-ram,id=a,size=1M -numa node,memdev=a -numa node,memdev=a", "used twice"),
        ("-device nope", "'nope' is not a valid device model name; accepted: isa-debug-exit"),
        ("-device pvpanic,foo=1", "Invalid parameter 'foo'; accepted: driver, events, id, ioport"),
        ("-global foo", "Invalid parameter 'foo'; accepted: driver, property, value"),
        ("-global driver=a", "Expected driver.property=value"),
        ("-drive file=a,if=virtio", "Parameter 'if' does not accept value 'virtio'"),
        ("-drive file=a,if=none", "Parameter 'id' is missing"),
        ("-drive file=a,if=none,id=d -drive file=b,if=none,id=d", "Drive with id 'd' already exists"),
        ("-device virtio-blk-device,drive=d", "Can't find drive 'd'"),
        ("-drive file=a,if=none,id=d " + 2 * "-device virtio-blk-device,drive=d ", "already in use"),
        ("-chardev null,id=c -device virtconsole,chardev=c", "No 'virtio-serial-bus' bus found"),
        ("-M none -device virtio-rng-device", "No 'virtio-bus' bus found"),
        (8 * "-device virtio-rng-device ", "There are 7 virtio transports"),
        ("-global virtio-mmio.force-legacy=on", "There is no legacy transport"),
        ("-drive file=a,format=qcow2", "Parameter 'format' does not accept value 'qcow2'"),
        ("-drive format=raw", "Parameter 'file' is missing"),
        ("-drive file=a -drive file=b", "One drive"),
        ("-drive file=a -kernel b", "Only one of -kernel and -drive"),
        ("-append x", "-append: Only allowed with"),
        (f"-kernel k -append {'x' * 4096}", "at most 4095 bytes, got 4096"),
        ("-incoming foo:", "unknown migration protocol: foo:; accepted: defer"),
        ("-action reboot=explode", "does not accept value 'explode'; accepted: reset, shutdown"),
        ("-serial foo", "'foo' is not a valid char driver; accepted: chardev:ID"),
        ("-serial tcp:1", "Error parsing address '1'"),
        ("-serial tcp:h:x", "Parameter 'port' expects"),
        ("-serial null -serial null", "The machine has one serial port"),
        ("-serial mon:chardev:a", "'mon:' makes a backend of its own"),
        ("-monitor mon:stdio", "cannot be shared with itself"),
        ("-monitor stdio,pretty=on", "'pretty' is not compatible with HMP monitors"),
        ("-chardev null,id=a -mon a,pretty=on", "'pretty' is not compatible with HMP monitors"),
        ("-chardev null,id=a -serial chardev:a -mon a", "is in use by '-mon a'"),
        ("-chardev stdio,id=a,mux=on -mon a,mode=control", "A QMP monitor cannot share its backend"),
        ("-serial unix:/s,server=on,x-exclusive=off", "'x-exclusive' is for QMP monitors that listen"),
        ("-qmp unix:/s,x-exclusive=off", "'x-exclusive' is for QMP monitors that listen"),
        ("-serial chardev:x", 'Chardev "x" not found'),
        ("-serial stdio -qmp stdio", "Cannot use stdio by multiple character devices"),
        ("-chardev null,id=a -serial chardev:a -mon a,mode=control", "is in use by '-mon a,mode=control'"),
        ("-chardev null,id=a -mon a,mode=control", "A QMP monitor needs a socket or stdio, not null"),
        ("-chardev null,id=a -chardev null,id=a", "Chardev with id 'a' already exists"),
        ("-chardev null", "Parameter 'id' is missing"),
        ("-chardev null,id=a,path=b", "Invalid parameter 'path' for a null backend"),
        ("-chardev file,id=a", "Parameter 'path' is missing"),
        ("-chardev socket,id=a", "A socket needs one of"),
        ("-chardev socket,id=a,pth=b", "did you mean 'path'?"),
        ("-chardev socket,id=a,path=b,wait=on", "'wait' option is incompatible"),
        ("-chardev socket,id=a,path=b,server=on,reconnect=1", "'reconnect' option is incompatible"),
        (f"-qmp unix:/{'x' * 108},server=on", "is too long: 109 bytes, at most 107"),
        ("-mon mode=control", "Parameter 'chardev' is missing"),
        ("-mon a", 'Chardev "a" not found'),
        ("-display gtk", "does not accept value 'gtk'; accepted: none"),
        ("-d foo", "Parameter 'item' does not accept value 'foo'"),
        ("-compat unstable-output=maybe", "accepted: accept, hide"),
        ("-daemonize -serial stdio", "Cannot be used with -daemonize"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("-version", "QEMU emulator version 7.2.22 (pageferry-0.1.0)\n"),
        ("-help", "usage: pageferry [options]"),
        ("-M help", "Supported machines are:\nmicrovm "),
        ("-M none,help", "memory-backend=<text>"),
        ("-cpu help", "x86 qemu64"),
        ("-accel help", "tcg"),
        ("-device help", 'name "isa-debug-exit", bus ISA'),
        ("-device pvpanic,help", "ioport=<number>"),
        ("-object help", "memory-backend-memfd"),
        ("-chardev help", "socket"),
        ("-d help", "migration"),
    ],
)
def test_help(text: str, answer: str) -> None:
    with pytest.raises(HelpRequested) as caught:
        parse(text)
    assert answer in str(caught.value)


def test_every_option_is_in_the_help_and_has_somebody_to_take_it() -> None:
    with pytest.raises(HelpRequested) as caught:
        parse("-help")
    builder = _Builder()
    for options in GROUPS.values():
        for option in options:
            assert f"-{option.name}" in str(caught.value)
            assert option.help
            assert option.harmless or option.name in builder._handlers or option.keys
    assert set(builder._handlers) <= set(OPTIONS)
