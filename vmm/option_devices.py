"""-device and -drive: what is plugged into the machine, and the images behind it.

-drive file=FILE,format=raw                                  boots from FILE; at most one
-drive file=FILE,format=raw,if=none,id=A  -device virtio-blk-device,drive=A      a disk
"""

from __future__ import annotations

from dataclasses import replace

from vmm import option_help
from vmm.config import DeviceConfig, DriveConfig, MachineConfig
from vmm.devices.catalog import DEVICES
from vmm.errors import OptionError
from vmm.option_backends import Backends
from vmm.option_help import HelpRequested
from vmm.option_syntax import Key, accepted, parse_items, parse_keys
from vmm.option_table import OPTIONS

__all__ = ["Devices"]

NAME = Key("text")
VIRTIO_TRANSPORTS = 7
"""For devices; an eighth has the clock's interrupt line and stays empty."""
VIRTIO_BUS = ("virtio-rng-device", "virtio-blk-device", "virtio-serial-device")


class Devices:
    """Collects; `finish` checks what belongs together."""

    def __init__(self) -> None:
        self._devices: list[DeviceConfig] = []
        self._drives: list[DriveConfig] = []
        self._boot_drive: str | None = None

    def add(self, text: str, shown: str, backends: Backends) -> None:
        """-device TEXT, `shown` in messages; a console or serial port takes its chardev from `backends`."""
        if text in ("help", "?"):
            raise HelpRequested(option_help.devices())
        driver = _driver(text)
        if driver not in DEVICES:
            raise OptionError(f"'{driver}' is not a valid device model name; {accepted(DEVICES, driver)}")
        device = DEVICES[driver]
        if "help" in text.split(","):
            raise HelpRequested(option_help.keys(driver, device.keys))
        keys = {"driver": NAME, "id": NAME, **device.keys}
        values = parse_keys(text, "driver", keys)
        del values["driver"]
        name = values.pop("id", None)
        if driver == "isa-serial":
            backends.use_for_serial(f"chardev:{values.get('chardev', '')}", shown)
        if driver == "virtconsole":
            if values.get("nr", 0) != 0:
                raise OptionError(f"Port {values['nr']}: the console is port 0")
            if "chardev" not in values:
                raise OptionError("Parameter 'chardev' is missing")
            backends.use_for_console(str(values["chardev"]), shown)
        config = DeviceConfig(driver, {**device.defaults, **values}, None if name is None else str(name))
        self._devices.append(config)

    def add_drive(self, text: str) -> None:
        """-drive TEXT."""
        values = parse_keys(text, None, OPTIONS["drive"].keys)
        interface = values.get("if", "ide")
        if interface not in ("ide", "none"):
            raise OptionError(f"Parameter 'if' does not accept value '{interface}'; accepted: ide, none")
        if values.get("format", "raw") != "raw":
            raise OptionError(f"Parameter 'format' does not accept value '{values['format']}'; accepted: raw")
        if "file" not in values:
            raise OptionError("Parameter 'file' is missing")
        if values.get("snapshot"):
            raise OptionError("Parameter 'snapshot' must be off: the guest writes to the file itself")
        if interface == "none":
            self._add_unplugged(values)
            return
        if self._boot_drive is not None:
            raise OptionError("One drive is what can be booted")
        self._boot_drive = str(values["file"])

    def _add_unplugged(self, values: dict[str, int | str | bool]) -> None:
        name = str(values.get("id", ""))
        if not name:
            raise OptionError("Parameter 'id' is missing: a -device names the drive by it")
        if any(drive.id == name for drive in self._drives):
            raise OptionError(f"Drive with id '{name}' already exists")
        self._drives.append(DriveConfig(name, str(values["file"]), bool(values.get("readonly", False))))

    def finish(self, machine: MachineConfig) -> MachineConfig:
        """`machine` with all of them. Raises OptionError where one has no bus or no drive."""
        machine = replace(
            machine,
            devices=tuple(self._devices),
            drives=tuple(self._drives),
            boot_drive=self._boot_drive,
        )
        _check_virtio(machine)
        return machine


def _driver(text: str) -> str:
    """Which -device it is; the other keys are read by that one's table."""
    if text[:1] == "{":
        return str(dict(parse_items(text, "driver", {"driver": NAME})).get("driver", ""))
    return text.split(",")[0].removeprefix("driver=")


def _check_virtio(machine: MachineConfig) -> None:
    """What virtio devices need must be there. Raises OptionError."""
    used: set[str] = set()
    buses: set[str] = set()
    for device in machine.devices:
        where = f"-device {device.driver}"
        if device.driver == "virtconsole":
            if "virtio-serial-device" not in buses:
                raise OptionError("No 'virtio-serial-bus' bus found for device 'virtconsole'", where)
        elif device.driver in VIRTIO_BUS:
            if machine.machine_type != "microvm" or (device.driver in buses & {"virtio-serial-device"}):
                raise OptionError(f"No 'virtio-bus' bus found for device '{device.driver}'", where)
            buses.add(device.driver)
        if device.driver == "virtio-blk-device":
            name = str(device.properties.get("drive", ""))
            known = [drive.id for drive in machine.drives]
            if name not in known:
                raise OptionError(f"Can't find drive '{name}'; {accepted(known, name)}", where)
            if name in used:
                raise OptionError(f"Drive '{name}' is already in use by another block device", where)
            used.add(name)
    if sum(device.driver in VIRTIO_BUS for device in machine.devices) > VIRTIO_TRANSPORTS:
        raise OptionError(f"There are {VIRTIO_TRANSPORTS} virtio transports, and more devices", "-device")
