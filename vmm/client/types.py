"""The types of the schema: an enum is a Literal, an object a dataclass. Made by tools/client_generator.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from vmm.client.base import NOT_GIVEN, Wire, given

__all__ = [
    "AddfdInfo",
    "BalloonInfo",
    "BitmapMigrationBitmapAlias",
    "BitmapMigrationBitmapAliasTransform",
    "BitmapMigrationNodeAlias",
    "BlockDeviceInfo",
    "BlockInfo",
    "BlockdevCacheInfo",
    "BlockdevDetectZeroesOptions",
    "ChardevInfo",
    "CommandInfo",
    "CompressionStats",
    "Convergence",
    "ConvergenceVerdict",
    "CpuInfoFast",
    "CpuInstanceProperties",
    "DirtyLogInfo",
    "DirtyLogPassedOver",
    "DirtyLogRung",
    "DumpGuestMemoryCapability",
    "DumpGuestMemoryFormat",
    "DumpQueryResult",
    "DumpStatus",
    "FaultLatency",
    "FdsetFdInfo",
    "FdsetInfo",
    "GuestPanicAction",
    "GuestPanicInformation",
    "GuestPanicInformationType",
    "ImageInfo",
    "JSONType",
    "KeyCode",
    "KeyValue",
    "KeyValueKind",
    "KvmInfo",
    "MachineInfo",
    "MemoryInfo",
    "MigrateSetParameters",
    "MigrationCapability",
    "MigrationCapabilityStatus",
    "MigrationInfo",
    "MigrationParameters",
    "MigrationStats",
    "MigrationStatus",
    "MissingPages",
    "MultiFDCompression",
    "NameInfo",
    "PageChecksums",
    "PostcopyState",
    "PostcopyStats",
    "QMPCapability",
    "RamDigest",
    "ReceivedStats",
    "RunState",
    "SchemaInfo",
    "SchemaInfoMember",
    "SchemaInfoVariant",
    "SchemaMetaType",
    "ShutdownCause",
    "SocketAddress",
    "SocketAddressType",
    "StatusInfo",
    "StrOrNull",
    "SysEmuTarget",
    "TargetInfo",
    "UuidInfo",
    "VersionInfo",
    "VersionTriple",
    "VfioStats",
    "WallClock",
    "XBZRLECacheStats",
]


KeyValueKind = Literal["number", "qcode"]
"""How a key is named."""


KeyCode = int | str
"""A key: its scan code, or its name."""


BlockdevDetectZeroesOptions = Literal["off", "on", "unmap"]
"""What becomes of zeroes that are written: off."""


StrOrNull = str | None
"""A string, or null to reset it."""


QMPCapability = Literal["oob"]
"""What a client may enable in the negotiation. oob: requests with exec-oob are executed out of band."""


DumpGuestMemoryFormat = Literal["elf", "kdump-zlib", "kdump-lzo", "kdump-snappy", "win-dmp"]
"""Of a dump. Only elf can be had."""


DumpStatus = Literal["none", "active", "completed", "failed"]
"""How far a dump is."""


SchemaMetaType = Literal["builtin", "enum", "array", "object", "alternate", "command", "event"]
"""The kind of an entity."""


JSONType = Literal["string", "number", "int", "boolean", "null", "object", "array", "value"]
"""The JSON types of a builtin type; value is any."""


SysEmuTarget = Literal["x86_64"]
"""The architecture that is emulated."""


MigrationStatus = Literal[
    "none",
    "setup",
    "cancelling",
    "cancelled",
    "active",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover",
    "completed",
    "failed",
    "colo",
    "pre-switchover",
    "device",
    "wait-unplug",
]
"""The state of a migration, in QEMU's names."""


MigrationCapability = Literal[
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "zero-blocks",
    "compress",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "block",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "x-postcopy-spool",
    "x-page-checksums",
]
"""What a migration may do; all off by default. xbzrle: Send the difference to the page sent before. rdma-
pin-all: Pin all RAM for RDMA. auto-converge: Throttle the guest when the migration does not converge.
zero-blocks: Do not write zero blocks when block devices are migrated. compress: Compress pages in
threads. events: Send MIGRATION and MIGRATION_PASS. postcopy-ram: Allow to start the guest on the
destination before all pages are there. x-colo: Lockstep copy of the guest. release-ram: Free pages on
the source once the destination has confirmed them in postcopy. block: Migrate block devices too.
return-path: Open the return path in precopy too. pause-before-switchover: Stop in the state pre-
switchover until migrate-continue. multifd: Send pages over several channels. dirty-bitmaps: Migrate
dirty bitmaps of block devices. postcopy-blocktime: Measure how long the guest waited for pages. late-
block-activate: Do not take block devices over before cont. x-ignore-shared: Do not migrate shared RAM.
validate-uuid: Check that both sides have the same UUID. background-snapshot: Migrate the state at the
start while the guest runs on. zero-copy-send: Send pages without copying them. postcopy-preempt: Send
requested pages over a channel of their own. x-postcopy-spool: Save what a source that is killed in
postcopy still owed. x-page-checksums: Check each page between two Pageferries, so that none arrives
damaged.
"""


MultiFDCompression = Literal["none", "zlib", "zstd"]
"""How the pages on multifd channels are compressed."""


SocketAddressType = Literal["inet", "unix", "vsock", "fd"]
"""The kind of a socket address."""


DirtyLogRung = Literal["engine", "async", "sync"]
"""How writes of the guest are found. engine: the CPU engine's own log of stores. async: asynchronous write
protection and a scan of the page map. sync: write protection faults.
"""


ConvergenceVerdict = Literal["unknown", "converging", "not-converging"]
"""Whether precopy will end by itself."""


PostcopyState = Literal["none", "advise", "discard", "listening", "running", "end"]
"""The state of the destination in postcopy. advise: the source may switch to postcopy. discard: pages that
are out of date are dropped. listening: page faults are served, the device state is being loaded.
running: the guest runs. end: every page is there.
"""


RunState = Literal[
    "debug",
    "inmigrate",
    "internal-error",
    "io-error",
    "paused",
    "postmigrate",
    "prelaunch",
    "finish-migrate",
    "restore-vm",
    "running",
    "save-vm",
    "shutdown",
    "suspended",
    "watchdog",
    "guest-panicked",
    "colo",
]
"""The state of the machine. inmigrate: waits for an incoming migration. prelaunch: was started with -S.
finish-migrate: stopped to complete a migration. postmigrate: a migration has moved the guest elsewhere.
guest-panicked: the guest reported a panic. internal-error: the engine failed.
"""


ShutdownCause = Literal[
    "none",
    "host-error",
    "host-qmp-quit",
    "host-qmp-system-reset",
    "host-signal",
    "host-ui",
    "guest-shutdown",
    "guest-reset",
    "guest-panic",
    "subsystem-reset",
    "snapshot-load",
]
"""Why a machine was shut down or reset."""


GuestPanicAction = Literal["pause", "poweroff", "run"]
"""What is done after a guest panic."""


GuestPanicInformationType = Literal["hyper-v", "s390"]
"""Whose panic information it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BalloonInfo:
    """How much memory the guest has."""

    actual: int
    """What the balloon leaves to it. In bytes."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            actual=value["actual"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValue:
    """A key."""

    type: KeyValueKind
    data: KeyCode

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            type=value["type"],
            data=value["data"],
        )

    def to_wire(self) -> Wire:
        """For a server."""
        return given(type=self.type, data=self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """The image of a disk."""

    filename: str
    """The file."""
    format_: str
    """raw."""
    virtual_size: int
    """Bytes that the guest sees."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            filename=value["filename"],
            format_=value["format"],
            virtual_size=value["virtual-size"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevCacheInfo:
    """How writes are cached."""

    writeback: bool
    """Whether a write ends before it is on the medium; a flush waits for that."""
    direct: bool
    """Whether the host's page cache is passed by; false."""
    no_flush: bool
    """Whether flushes are ignored; false."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            writeback=value["writeback"],
            direct=value["direct"],
            no_flush=value["no-flush"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDeviceInfo:
    """What is in a block device."""

    file: str
    """The file."""
    ro: bool
    """Whether the guest may only read."""
    drv: str
    """raw."""
    backing_file_depth: int
    """No image has a backing file: 0."""
    encrypted: bool
    """false."""
    detect_zeroes: BlockdevDetectZeroesOptions
    """off."""
    bps: int
    """No limit: 0."""
    bps_rd: int
    """No limit: 0."""
    bps_wr: int
    """No limit: 0."""
    iops: int
    """No limit: 0."""
    iops_rd: int
    """No limit: 0."""
    iops_wr: int
    """No limit: 0."""
    image: ImageInfo
    """The image."""
    cache: BlockdevCacheInfo
    """The cache."""
    write_threshold: int
    """None: 0."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            file=value["file"],
            ro=value["ro"],
            drv=value["drv"],
            backing_file_depth=value["backing_file_depth"],
            encrypted=value["encrypted"],
            detect_zeroes=value["detect_zeroes"],
            bps=value["bps"],
            bps_rd=value["bps_rd"],
            bps_wr=value["bps_wr"],
            iops=value["iops"],
            iops_rd=value["iops_rd"],
            iops_wr=value["iops_wr"],
            image=ImageInfo.from_wire(value["image"]),
            cache=BlockdevCacheInfo.from_wire(value["cache"]),
            write_threshold=value["write_threshold"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    """A block device."""

    device: str
    """The id of its -drive."""
    type: str
    """unknown, as in QEMU."""
    removable: bool
    """false."""
    locked: bool
    """false."""
    qdev: str | None = None
    """The path of the device that uses it."""
    inserted: BlockDeviceInfo | None = None
    """What is in it."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            device=value["device"],
            type=value["type"],
            removable=value["removable"],
            locked=value["locked"],
            qdev=value.get("qdev"),
            inserted=None if (got := value.get("inserted")) is None else BlockDeviceInfo.from_wire(got),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChardevInfo:
    """A character device."""

    label: str
    """Its id."""
    filename: str
    """What it is connected to."""
    frontend_open: bool
    """Whether something uses it."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            label=value["label"],
            filename=value["filename"],
            frontend_open=value["frontend-open"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionTriple:
    """A version of three numbers."""

    major: int
    """The major number."""
    minor: int
    """The minor number."""
    micro: int
    """The micro number."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            major=value["major"],
            minor=value["minor"],
            micro=value["micro"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """The version of the QEMU whose protocol is spoken, and the program that speaks it."""

    qemu: VersionTriple
    """The QEMU release whose commands, events and migration stream these are."""
    package: str
    """This program's own name and version."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            qemu=VersionTriple.from_wire(value["qemu"]),
            package=value["package"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandInfo:
    """A command that can be executed."""

    name: str
    """Its name."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            name=value["name"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AddfdInfo:
    """Where add-fd has put a file descriptor."""

    fdset_id: int
    """The number of its set; /dev/fdset/NUMBER is the path that names the set."""
    fd: int
    """Its number in this process."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            fdset_id=value["fdset-id"],
            fd=value["fd"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FdsetFdInfo:
    """A file descriptor in a set."""

    fd: int
    """Its number in this process."""
    opaque: str | None = None
    """What add-fd said about it."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            fd=value["fd"],
            opaque=value.get("opaque"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FdsetInfo:
    """A set of file descriptors."""

    fdset_id: int
    """Its number."""
    fds: list[FdsetFdInfo]
    """What is in it, the first added first."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            fdset_id=value["fdset-id"],
            fds=[FdsetFdInfo.from_wire(each) for each in value["fds"]],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpQueryResult:
    """The latest dump."""

    status: DumpStatus
    completed: int
    """How much of memory has been written. In bytes."""
    total: int
    """How much there is to write. In bytes."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            status=value["status"],
            completed=value["completed"],
            total=value["total"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpGuestMemoryCapability:
    """What dumps can be had."""

    formats: list[DumpGuestMemoryFormat]
    """The formats."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            formats=value["formats"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoVariant:
    """The members an object has besides for one value of its tag."""

    case: str
    """The tag's value."""
    type: str
    """The entity with the members."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            case=value["case"],
            type=value["type"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfoMember:
    """A member of an object or alternate, or a value of an enumeration: by the entity's meta-type the
    members of those types are there.
    """

    name: str | None = None
    """The name; absent in an alternate."""
    type: str | None = None
    """The name of its type's entity."""
    default: None | None = None
    """Present if the member is optional."""
    features: list[str] | None = None
    """Such as unstable."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            name=value.get("name"),
            type=value.get("type"),
            default=value.get("default"),
            features=value.get("features"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaInfo:
    """One entity of the schema; which members it has follows from the meta-type."""

    name: str
    """The entity's name; for types a number that means nothing."""
    meta_type: SchemaMetaType
    features: list[str] | None = None
    """Such as unstable or deprecated."""
    json_type: JSONType | None = None
    """For a builtin type."""
    members: list[SchemaInfoMember] | None = None
    """For an enumeration its values, for an object or alternate its members."""
    values: list[str] | None = None
    """For an enumeration, the names of its members (deprecated)."""
    element_type: str | None = None
    """For an array."""
    tag: str | None = None
    """For an object with variants, the member that decides."""
    variants: list[SchemaInfoVariant] | None = None
    """For an object with variants."""
    arg_type: str | None = None
    """For a command or event, the object type of its arguments or data."""
    ret_type: str | None = None
    """For a command."""
    allow_oob: bool | None = None
    """For a command: it may be executed out of band. Absent means false."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            name=value["name"],
            meta_type=value["meta-type"],
            features=value.get("features"),
            json_type=value.get("json-type"),
            members=None
            if (got := value.get("members")) is None
            else [SchemaInfoMember.from_wire(each) for each in got],
            values=value.get("values"),
            element_type=value.get("element-type"),
            tag=value.get("tag"),
            variants=None
            if (got := value.get("variants")) is None
            else [SchemaInfoVariant.from_wire(each) for each in got],
            arg_type=value.get("arg-type"),
            ret_type=value.get("ret-type"),
            allow_oob=value.get("allow-oob"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NameInfo:
    """The name of the guest."""

    name: str | None = None
    """As given with -name; absent if none was."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            name=value.get("name"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UuidInfo:
    """The UUID of the guest."""

    UUID: str
    """Zeros if none was given."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            UUID=value["UUID"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvmInfo:
    """KVM support."""

    enabled: bool
    """Whether the guest runs on KVM."""
    present: bool
    """Whether this program could use it."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            enabled=value["enabled"],
            present=value["present"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineInfo:
    """A type of machine."""

    name: str
    """As -machine takes it."""
    cpu_max: int
    """The most CPUs it can have."""
    hotpluggable_cpus: bool
    """Whether CPUs can be added while it runs."""
    numa_mem_supported: bool
    """Whether -numa node,mem is supported."""
    deprecated: bool
    """Whether it will go away."""
    alias: str | None = None
    """Another name for it."""
    is_default: bool | None = None
    """Whether it is used without -machine."""
    default_cpu_type: str | None = None
    """The CPU it has without -cpu."""
    default_ram_id: str | None = None
    """The name of its RAM block."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            name=value["name"],
            cpu_max=value["cpu-max"],
            hotpluggable_cpus=value["hotpluggable-cpus"],
            numa_mem_supported=value["numa-mem-supported"],
            deprecated=value["deprecated"],
            alias=value.get("alias"),
            is_default=value.get("is-default"),
            default_cpu_type=value.get("default-cpu-type"),
            default_ram_id=value.get("default-ram-id"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """What is emulated."""

    arch: SysEmuTarget

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            arch=value["arch"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuInstanceProperties:
    """Where a CPU sits."""

    node_id: int | None = None
    """The number of the node."""
    socket_id: int | None = None
    """The number of the socket."""
    die_id: int | None = None
    """The number of the die."""
    cluster_id: int | None = None
    """The number of the cluster."""
    core_id: int | None = None
    """The number of the core."""
    thread_id: int | None = None
    """The number of the thread."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            node_id=value.get("node-id"),
            socket_id=value.get("socket-id"),
            die_id=value.get("die-id"),
            cluster_id=value.get("cluster-id"),
            core_id=value.get("core-id"),
            thread_id=value.get("thread-id"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuInfoFast:
    """A virtual CPU."""

    cpu_index: int
    """Its number."""
    qom_path: str
    """Its path in the object tree."""
    thread_id: int
    """The host thread that runs it."""
    target: SysEmuTarget
    props: CpuInstanceProperties | None = None

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            cpu_index=value["cpu-index"],
            qom_path=value["qom-path"],
            thread_id=value["thread-id"],
            target=value["target"],
            props=None if (got := value.get("props")) is None else CpuInstanceProperties.from_wire(got),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryInfo:
    """The size of guest RAM."""

    base_memory: int
    """The size given with -m. In bytes."""
    plugged_memory: int | None = None
    """RAM added later. In bytes."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            base_memory=value["base-memory"],
            plugged_memory=value.get("plugged-memory"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RamDigest:
    """What one RAM block holds."""

    name: str
    """The name of the block."""
    sha256: str
    """Of its pages that are not zero, each after its number as 8 bytes, big-endian."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            name=value["name"],
            sha256=value["sha256"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationCapabilityStatus:
    """A capability and whether it is on."""

    capability: MigrationCapability
    state: bool
    """Whether it is on."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            capability=value["capability"],
            state=value["state"],
        )

    def to_wire(self) -> Wire:
        """For a server."""
        return given(capability=self.capability, state=self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapMigrationBitmapAliasTransform:
    """What is changed in a dirty bitmap."""

    persistent: bool | None = None
    """Whether it is stored with the image afterwards."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            persistent=value.get("persistent"),
        )

    def to_wire(self) -> Wire:
        """For a server."""
        return given(persistent=NOT_GIVEN if self.persistent is None else self.persistent)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapMigrationBitmapAlias:
    """A dirty bitmap's name on the wire."""

    name: str
    """Its name here."""
    alias: str
    """Its name on the wire."""
    transform: BitmapMigrationBitmapAliasTransform | None = None

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            name=value["name"],
            alias=value["alias"],
            transform=None
            if (got := value.get("transform")) is None
            else BitmapMigrationBitmapAliasTransform.from_wire(got),
        )

    def to_wire(self) -> Wire:
        """For a server."""
        return given(
            name=self.name,
            alias=self.alias,
            transform=NOT_GIVEN if self.transform is None else self.transform.to_wire(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapMigrationNodeAlias:
    """A block node's name on the wire."""

    node_name: str
    """Its name here."""
    alias: str
    """Its name on the wire."""
    bitmaps: list[BitmapMigrationBitmapAlias]
    """Its dirty bitmaps."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            node_name=value["node-name"],
            alias=value["alias"],
            bitmaps=[BitmapMigrationBitmapAlias.from_wire(each) for each in value["bitmaps"]],
        )

    def to_wire(self) -> Wire:
        """For a server."""
        return given(
            node_name=self.node_name, alias=self.alias, bitmaps=[each.to_wire() for each in self.bitmaps]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateSetParameters:
    """Parameters to set; those absent stay as they are."""

    announce_initial: int | None = None
    """Delay before the first self-announcement. In ms."""
    announce_max: int | None = None
    """Longest delay between self-announcements. In ms."""
    announce_rounds: int | None = None
    """Number of self-announcements."""
    announce_step: int | None = None
    """How much the delay grows. In ms."""
    compress_level: int | None = None
    """Level of the capability compress, 0 (none) to 9."""
    compress_threads: int | None = None
    """Compressing threads, 1 to 255."""
    compress_wait_thread: bool | None = None
    """Whether a page waits for a free compressing thread or is sent uncompressed."""
    decompress_threads: int | None = None
    """Decompressing threads, 1 to 255."""
    throttle_trigger_threshold: int | None = None
    """Ratio of bytes dirtied to bytes sent in a pass that starts throttling. In percent."""
    cpu_throttle_initial: int | None = None
    """First throttling of the guest, 1 to 99. In percent."""
    cpu_throttle_increment: int | None = None
    """How much the throttling grows, 1 to 99. In percent."""
    cpu_throttle_tailslow: bool | None = None
    """Whether the last increments are small."""
    tls_creds: StrOrNull | None = None
    """The id of the TLS credentials, empty for no TLS."""
    tls_hostname: StrOrNull | None = None
    """The name to expect in the destination's certificate, empty for the name in the URI."""
    tls_authz: StrOrNull | None = None
    """The id of the authorization object for the source's certificate."""
    max_bandwidth: int | None = None
    """Most that precopy sends, 0 for no limit. In bytes/s."""
    downtime_limit: int | None = None
    """Longest tolerated downtime, 0 to 2000000. In ms."""
    x_checkpoint_delay: int | None = None
    """Delay between two checkpoints of x-colo. In ms."""
    block_incremental: bool | None = None
    """Whether only the top layer of block devices is migrated."""
    multifd_channels: int | None = None
    """Channels of the capability multifd, 1 to 255."""
    xbzrle_cache_size: int | None = None
    """Size of the cache of sent pages; a power of two, at least a page. In bytes."""
    max_postcopy_bandwidth: int | None = None
    """Most that postcopy sends besides requested pages, 0 for no limit. In bytes/s."""
    max_cpu_throttle: int | None = None
    """Strongest throttling of the guest, cpu-throttle-initial to 99. In percent."""
    multifd_compression: MultiFDCompression | None = None
    """How multifd compresses."""
    multifd_zlib_level: int | None = None
    """Level of zlib, 0 to 9."""
    multifd_zstd_level: int | None = None
    """Level of zstd, 0 to 20."""
    block_bitmap_mapping: list[BitmapMigrationNodeAlias] | None = None
    """Names of nodes and dirty bitmaps on the wire."""
    x_postcopy_start_time: int | None = None
    """Switch to postcopy by itself if precopy has not finished after this time; 0: never. In ms."""
    x_postcopy_spool_path: str | None = None
    """Where what a source that is killed in postcopy still owed is saved, with the capability x-postcopy-
    spool.
    """
    x_handshake_timeout: int | None = None
    """A peer that connects to a listening destination and has not sent header and configuration by then is
    turned away; 0: it may take for ever. In ms.
    """
    x_peer_timeout: int | None = None
    """A peer that gives no sign of life for so long counts as lost: precopy fails, postcopy pauses. At
    least 1000; 0: never. Between two Pageferries; on tcp: a dead host or link of any peer. In ms.
    """

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            announce_initial=value.get("announce-initial"),
            announce_max=value.get("announce-max"),
            announce_rounds=value.get("announce-rounds"),
            announce_step=value.get("announce-step"),
            compress_level=value.get("compress-level"),
            compress_threads=value.get("compress-threads"),
            compress_wait_thread=value.get("compress-wait-thread"),
            decompress_threads=value.get("decompress-threads"),
            throttle_trigger_threshold=value.get("throttle-trigger-threshold"),
            cpu_throttle_initial=value.get("cpu-throttle-initial"),
            cpu_throttle_increment=value.get("cpu-throttle-increment"),
            cpu_throttle_tailslow=value.get("cpu-throttle-tailslow"),
            tls_creds=value.get("tls-creds"),
            tls_hostname=value.get("tls-hostname"),
            tls_authz=value.get("tls-authz"),
            max_bandwidth=value.get("max-bandwidth"),
            downtime_limit=value.get("downtime-limit"),
            x_checkpoint_delay=value.get("x-checkpoint-delay"),
            block_incremental=value.get("block-incremental"),
            multifd_channels=value.get("multifd-channels"),
            xbzrle_cache_size=value.get("xbzrle-cache-size"),
            max_postcopy_bandwidth=value.get("max-postcopy-bandwidth"),
            max_cpu_throttle=value.get("max-cpu-throttle"),
            multifd_compression=value.get("multifd-compression"),
            multifd_zlib_level=value.get("multifd-zlib-level"),
            multifd_zstd_level=value.get("multifd-zstd-level"),
            block_bitmap_mapping=None
            if (got := value.get("block-bitmap-mapping")) is None
            else [BitmapMigrationNodeAlias.from_wire(each) for each in got],
            x_postcopy_start_time=value.get("x-postcopy-start-time"),
            x_postcopy_spool_path=value.get("x-postcopy-spool-path"),
            x_handshake_timeout=value.get("x-handshake-timeout"),
            x_peer_timeout=value.get("x-peer-timeout"),
        )

    def to_wire(self) -> Wire:
        """For a server."""
        return given(
            announce_initial=NOT_GIVEN if self.announce_initial is None else self.announce_initial,
            announce_max=NOT_GIVEN if self.announce_max is None else self.announce_max,
            announce_rounds=NOT_GIVEN if self.announce_rounds is None else self.announce_rounds,
            announce_step=NOT_GIVEN if self.announce_step is None else self.announce_step,
            compress_level=NOT_GIVEN if self.compress_level is None else self.compress_level,
            compress_threads=NOT_GIVEN if self.compress_threads is None else self.compress_threads,
            compress_wait_thread=NOT_GIVEN
            if self.compress_wait_thread is None
            else self.compress_wait_thread,
            decompress_threads=NOT_GIVEN if self.decompress_threads is None else self.decompress_threads,
            throttle_trigger_threshold=NOT_GIVEN
            if self.throttle_trigger_threshold is None
            else self.throttle_trigger_threshold,
            cpu_throttle_initial=NOT_GIVEN
            if self.cpu_throttle_initial is None
            else self.cpu_throttle_initial,
            cpu_throttle_increment=NOT_GIVEN
            if self.cpu_throttle_increment is None
            else self.cpu_throttle_increment,
            cpu_throttle_tailslow=NOT_GIVEN
            if self.cpu_throttle_tailslow is None
            else self.cpu_throttle_tailslow,
            tls_creds=NOT_GIVEN if self.tls_creds is None else self.tls_creds,
            tls_hostname=NOT_GIVEN if self.tls_hostname is None else self.tls_hostname,
            tls_authz=NOT_GIVEN if self.tls_authz is None else self.tls_authz,
            max_bandwidth=NOT_GIVEN if self.max_bandwidth is None else self.max_bandwidth,
            downtime_limit=NOT_GIVEN if self.downtime_limit is None else self.downtime_limit,
            x_checkpoint_delay=NOT_GIVEN if self.x_checkpoint_delay is None else self.x_checkpoint_delay,
            block_incremental=NOT_GIVEN if self.block_incremental is None else self.block_incremental,
            multifd_channels=NOT_GIVEN if self.multifd_channels is None else self.multifd_channels,
            xbzrle_cache_size=NOT_GIVEN if self.xbzrle_cache_size is None else self.xbzrle_cache_size,
            max_postcopy_bandwidth=NOT_GIVEN
            if self.max_postcopy_bandwidth is None
            else self.max_postcopy_bandwidth,
            max_cpu_throttle=NOT_GIVEN if self.max_cpu_throttle is None else self.max_cpu_throttle,
            multifd_compression=NOT_GIVEN if self.multifd_compression is None else self.multifd_compression,
            multifd_zlib_level=NOT_GIVEN if self.multifd_zlib_level is None else self.multifd_zlib_level,
            multifd_zstd_level=NOT_GIVEN if self.multifd_zstd_level is None else self.multifd_zstd_level,
            block_bitmap_mapping=NOT_GIVEN
            if self.block_bitmap_mapping is None
            else [each.to_wire() for each in self.block_bitmap_mapping],
            x_postcopy_start_time=NOT_GIVEN
            if self.x_postcopy_start_time is None
            else self.x_postcopy_start_time,
            x_postcopy_spool_path=NOT_GIVEN
            if self.x_postcopy_spool_path is None
            else self.x_postcopy_spool_path,
            x_handshake_timeout=NOT_GIVEN if self.x_handshake_timeout is None else self.x_handshake_timeout,
            x_peer_timeout=NOT_GIVEN if self.x_peer_timeout is None else self.x_peer_timeout,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationParameters:
    """All parameters."""

    announce_initial: int | None = None
    """Delay before the first self-announcement. In ms."""
    announce_max: int | None = None
    """Longest delay between self-announcements. In ms."""
    announce_rounds: int | None = None
    """Number of self-announcements."""
    announce_step: int | None = None
    """How much the delay grows. In ms."""
    compress_level: int | None = None
    """Level of the capability compress, 0 (none) to 9."""
    compress_threads: int | None = None
    """Compressing threads, 1 to 255."""
    compress_wait_thread: bool | None = None
    """Whether a page waits for a free compressing thread or is sent uncompressed."""
    decompress_threads: int | None = None
    """Decompressing threads, 1 to 255."""
    throttle_trigger_threshold: int | None = None
    """Ratio of bytes dirtied to bytes sent in a pass that starts throttling. In percent."""
    cpu_throttle_initial: int | None = None
    """First throttling of the guest, 1 to 99. In percent."""
    cpu_throttle_increment: int | None = None
    """How much the throttling grows, 1 to 99. In percent."""
    cpu_throttle_tailslow: bool | None = None
    """Whether the last increments are small."""
    tls_creds: str | None = None
    """The id of the TLS credentials, empty for no TLS."""
    tls_hostname: str | None = None
    """The name to expect in the destination's certificate, empty for the name in the URI."""
    tls_authz: str | None = None
    """The id of the authorization object for the source's certificate."""
    max_bandwidth: int | None = None
    """Most that precopy sends, 0 for no limit. In bytes/s."""
    downtime_limit: int | None = None
    """Longest tolerated downtime, 0 to 2000000. In ms."""
    x_checkpoint_delay: int | None = None
    """Delay between two checkpoints of x-colo. In ms."""
    block_incremental: bool | None = None
    """Whether only the top layer of block devices is migrated."""
    multifd_channels: int | None = None
    """Channels of the capability multifd, 1 to 255."""
    xbzrle_cache_size: int | None = None
    """Size of the cache of sent pages; a power of two, at least a page. In bytes."""
    max_postcopy_bandwidth: int | None = None
    """Most that postcopy sends besides requested pages, 0 for no limit. In bytes/s."""
    max_cpu_throttle: int | None = None
    """Strongest throttling of the guest, cpu-throttle-initial to 99. In percent."""
    multifd_compression: MultiFDCompression | None = None
    """How multifd compresses."""
    multifd_zlib_level: int | None = None
    """Level of zlib, 0 to 9."""
    multifd_zstd_level: int | None = None
    """Level of zstd, 0 to 20."""
    block_bitmap_mapping: list[BitmapMigrationNodeAlias] | None = None
    """Names of nodes and dirty bitmaps on the wire."""
    x_postcopy_start_time: int | None = None
    """Switch to postcopy by itself if precopy has not finished after this time; 0: never. In ms."""
    x_postcopy_spool_path: str | None = None
    """Where what a source that is killed in postcopy still owed is saved, with the capability x-postcopy-
    spool.
    """
    x_handshake_timeout: int | None = None
    """A peer that connects to a listening destination and has not sent header and configuration by then is
    turned away; 0: it may take for ever. In ms.
    """
    x_peer_timeout: int | None = None
    """A peer that gives no sign of life for so long counts as lost: precopy fails, postcopy pauses. At
    least 1000; 0: never. Between two Pageferries; on tcp: a dead host or link of any peer. In ms.
    """

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            announce_initial=value.get("announce-initial"),
            announce_max=value.get("announce-max"),
            announce_rounds=value.get("announce-rounds"),
            announce_step=value.get("announce-step"),
            compress_level=value.get("compress-level"),
            compress_threads=value.get("compress-threads"),
            compress_wait_thread=value.get("compress-wait-thread"),
            decompress_threads=value.get("decompress-threads"),
            throttle_trigger_threshold=value.get("throttle-trigger-threshold"),
            cpu_throttle_initial=value.get("cpu-throttle-initial"),
            cpu_throttle_increment=value.get("cpu-throttle-increment"),
            cpu_throttle_tailslow=value.get("cpu-throttle-tailslow"),
            tls_creds=value.get("tls-creds"),
            tls_hostname=value.get("tls-hostname"),
            tls_authz=value.get("tls-authz"),
            max_bandwidth=value.get("max-bandwidth"),
            downtime_limit=value.get("downtime-limit"),
            x_checkpoint_delay=value.get("x-checkpoint-delay"),
            block_incremental=value.get("block-incremental"),
            multifd_channels=value.get("multifd-channels"),
            xbzrle_cache_size=value.get("xbzrle-cache-size"),
            max_postcopy_bandwidth=value.get("max-postcopy-bandwidth"),
            max_cpu_throttle=value.get("max-cpu-throttle"),
            multifd_compression=value.get("multifd-compression"),
            multifd_zlib_level=value.get("multifd-zlib-level"),
            multifd_zstd_level=value.get("multifd-zstd-level"),
            block_bitmap_mapping=None
            if (got := value.get("block-bitmap-mapping")) is None
            else [BitmapMigrationNodeAlias.from_wire(each) for each in got],
            x_postcopy_start_time=value.get("x-postcopy-start-time"),
            x_postcopy_spool_path=value.get("x-postcopy-spool-path"),
            x_handshake_timeout=value.get("x-handshake-timeout"),
            x_peer_timeout=value.get("x-peer-timeout"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationStats:
    """What was transferred, and what is left."""

    transferred: int
    """Sent so far. In bytes."""
    remaining: int
    """Known to be left. In bytes."""
    total: int
    """Size of guest RAM. In bytes."""
    duplicate: int
    """Zero pages sent. In pages."""
    skipped: int
    """Always 0."""
    normal: int
    """Pages sent whole. In pages."""
    normal_bytes: int
    """Bytes of pages sent whole. In bytes."""
    dirty_pages_rate: int
    """Pages the guest dirties. In pages/s."""
    mbps: float
    """Throughput. In Mbit/s."""
    dirty_sync_count: int
    """Bitmap syncs so far."""
    postcopy_requests: int
    """Pages requested by the destination."""
    page_size: int
    """Size of a page. In bytes."""
    multifd_bytes: int
    """Sent over multifd channels. In bytes."""
    pages_per_second: int
    """Pages sent. In pages/s."""
    precopy_bytes: int
    """Sent while the guest ran at the source. In bytes."""
    downtime_bytes: int
    """Sent while the guest was stopped. In bytes."""
    postcopy_bytes: int
    """Sent while the guest ran at the destination. In bytes."""
    dirty_sync_missed_zero_copy: int
    """Dirty syncs that zero-copy-send did not see."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            transferred=value["transferred"],
            remaining=value["remaining"],
            total=value["total"],
            duplicate=value["duplicate"],
            skipped=value["skipped"],
            normal=value["normal"],
            normal_bytes=value["normal-bytes"],
            dirty_pages_rate=value["dirty-pages-rate"],
            mbps=value["mbps"],
            dirty_sync_count=value["dirty-sync-count"],
            postcopy_requests=value["postcopy-requests"],
            page_size=value["page-size"],
            multifd_bytes=value["multifd-bytes"],
            pages_per_second=value["pages-per-second"],
            precopy_bytes=value["precopy-bytes"],
            downtime_bytes=value["downtime-bytes"],
            postcopy_bytes=value["postcopy-bytes"],
            dirty_sync_missed_zero_copy=value["dirty-sync-missed-zero-copy"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VfioStats:
    """What was transferred of assigned devices."""

    transferred: int
    """Sent so far. In bytes."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            transferred=value["transferred"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class XBZRLECacheStats:
    """How the capability xbzrle does."""

    cache_size: int
    """Size of the cache. In bytes."""
    bytes: int
    """Sent. In bytes."""
    pages: int
    """Sent. In pages."""
    cache_miss: int
    """Pages not in the cache."""
    cache_miss_rate: float
    """Share of them."""
    encoding_rate: float
    """Compression ratio."""
    overflow: int
    """Pages that got longer."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            cache_size=value["cache-size"],
            bytes=value["bytes"],
            pages=value["pages"],
            cache_miss=value["cache-miss"],
            cache_miss_rate=value["cache-miss-rate"],
            encoding_rate=value["encoding-rate"],
            overflow=value["overflow"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionStats:
    """How the capability compress does."""

    pages: int
    """Compressed. In pages."""
    busy: int
    """Times no thread was free."""
    busy_rate: float
    """Share of them."""
    compressed_size: int
    """After compression. In bytes."""
    compression_rate: float
    """Compression ratio."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            pages=value["pages"],
            busy=value["busy"],
            busy_rate=value["busy-rate"],
            compressed_size=value["compressed-size"],
            compression_rate=value["compression-rate"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketAddress:
    """A socket address; which members it has follows from the type."""

    type: SocketAddressType
    host: str | None = None
    """inet."""
    port: str | None = None
    """inet, vsock."""
    numeric: bool | None = None
    """inet: host and port are numbers."""
    to: int | None = None
    """inet: last port to try."""
    ipv4: bool | None = None
    """inet: whether IPv4 is used."""
    ipv6: bool | None = None
    """inet: whether IPv6 is used."""
    keep_alive: bool | None = None
    """inet: whether keep-alive is on."""
    mptcp: bool | None = None
    """inet: whether MPTCP is on."""
    path: str | None = None
    """unix."""
    abstract: bool | None = None
    """unix: in the abstract namespace."""
    tight: bool | None = None
    """unix: an abstract name is not padded."""
    cid: str | None = None
    """vsock."""
    str: str | None = None
    """fd: number or name."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            type=value["type"],
            host=value.get("host"),
            port=value.get("port"),
            numeric=value.get("numeric"),
            to=value.get("to"),
            ipv4=value.get("ipv4"),
            ipv6=value.get("ipv6"),
            keep_alive=value.get("keep-alive"),
            mptcp=value.get("mptcp"),
            path=value.get("path"),
            abstract=value.get("abstract"),
            tight=value.get("tight"),
            cid=value.get("cid"),
            str=value.get("str"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DirtyLogPassedOver:
    """Why better ways could not be used."""

    engine: str | None = None
    """The reason."""
    async_: str | None = None
    """The reason."""
    sync: str | None = None
    """The reason."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            engine=value.get("engine"),
            async_=value.get("async"),
            sync=value.get("sync"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DirtyLogInfo:
    """The dirty log of the migration, at the source."""

    rung: DirtyLogRung
    passed_over: DirtyLogPassedOver | None = None

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            rung=value["rung"],
            passed_over=None
            if (got := value.get("passed-over")) is None
            else DirtyLogPassedOver.from_wire(got),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Convergence:
    """Whether precopy will end by itself at the present rates; while it runs."""

    verdict: ConvergenceVerdict
    reason: str
    """The verdict in words, with why."""
    bandwidth: int
    """Sent. In bytes/second."""
    dirty_rate: int
    """Dirtied by the guest, as of the last sync. In bytes/second."""
    threshold: int
    """When less remains, the guest is stopped: what the downtime limit allows to send. In bytes."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            verdict=value["verdict"],
            reason=value["reason"],
            bandwidth=value["bandwidth"],
            dirty_rate=value["dirty-rate"],
            threshold=value["threshold"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PostcopyStats:
    """What postcopy did, at the source."""

    requested_pages: int
    """Sent because the destination asked. In pages."""
    pushed_pages: int
    """Sent without being asked for. In pages."""
    resent_pages: int
    """Sent although they had been sent before. In pages."""
    discarded_pages: int
    """Discarded at the destination when postcopy started. In pages."""
    stale_pages: int
    """Sent and out of date when postcopy started. In pages."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            requested_pages=value["requested-pages"],
            pushed_pages=value["pushed-pages"],
            resent_pages=value["resent-pages"],
            discarded_pages=value["discarded-pages"],
            stale_pages=value["stale-pages"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultLatency:
    """How long the guest waited for requested pages, at the destination."""

    count: int
    """Requested pages that arrived."""
    sum: int
    """All their latencies together. In ns."""
    median: int
    """The median. In ns."""
    p99: int
    """The 99th percentile. In ns."""
    maximum: int
    """The longest. In ns."""
    distribution: list[int]
    """24 counters; N counts latencies of 2^N to 2^(N+1) microseconds, the last also all longer ones."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            count=value["count"],
            sum=value["sum"],
            median=value["median"],
            p99=value["p99"],
            maximum=value["maximum"],
            distribution=value["distribution"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedStats:
    """What has arrived, at the destination."""

    normal_pages: int
    """Pages that came whole. In pages."""
    zero_pages: int
    """Zero pages. In pages."""
    duplicates: int
    """Pages that had arrived before. In pages."""
    faults: int
    """Page faults taken."""
    requests: int
    """Requests sent to the source."""
    served_locally: int
    """Faults on pages that had arrived in the meantime."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            normal_pages=value["normal-pages"],
            zero_pages=value["zero-pages"],
            duplicates=value["duplicates"],
            faults=value["faults"],
            requests=value["requests"],
            served_locally=value["served-locally"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PageChecksums:
    """Whether each page is checked, after the peer has been asked."""

    state: bool
    """Do pages go with checksums?"""
    reason: str | None = None
    """Why not."""
    checked_pages: int | None = None
    """At the destination: how many were right."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            state=value["state"],
            reason=value.get("reason"),
            checked_pages=value.get("checked-pages"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingPages:
    """What has not been received."""

    pages: int
    """How many."""
    waited_for: int
    """Those among them that somebody waits for: the vCPU, or a reader of guest memory."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            pages=value["pages"],
            waited_for=value["waited-for"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WallClock:
    """A moment, as in the timestamps of events."""

    seconds: int
    """Since 1970, UTC."""
    microseconds: int
    """0 to 999999."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            seconds=value["seconds"],
            microseconds=value["microseconds"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationInfo:
    """The migration that runs or ran last. Empty if there was none."""

    status: MigrationStatus | None = None
    ram: MigrationStats | None = None
    """RAM; from active on."""
    disk: MigrationStats | None = None
    """Block devices."""
    vfio: VfioStats | None = None
    xbzrle_cache: XBZRLECacheStats | None = None
    total_time: int | None = None
    """Since the start. In ms."""
    expected_downtime: int | None = None
    """If it switched over now; until completed. In ms."""
    downtime: int | None = None
    """How long the guest stood still; when completed. In ms."""
    setup_time: int | None = None
    """From the command to the first page. In ms."""
    cpu_throttle_percentage: int | None = None
    """Throttling of the guest now. In percent."""
    error_desc: str | None = None
    """Why it failed."""
    blocked_reasons: list[str] | None = None
    """Why no migration can start."""
    postcopy_blocktime: int | None = None
    """How long all CPUs waited for pages; at the destination, capability postcopy-blocktime. In ms."""
    postcopy_vcpu_blocktime: list[int] | None = None
    """The same for each CPU."""
    postcopy_latency: int | None = None
    """Mean time that a fault waited for its page to come from the source; with postcopy-blocktime. In ns."""
    postcopy_latency_dist: list[int] | None = None
    """24 counters; N counts faults of 2^N to 2^(N+1) microseconds, the last also all longer ones."""
    postcopy_vcpu_latency: list[int] | None = None
    """The mean for each CPU."""
    postcopy_non_vcpu_latency: int | None = None
    """The mean of all threads that are no CPU. In ns."""
    compression: CompressionStats | None = None
    socket_address: list[SocketAddress] | None = None
    """Where an incoming migration is awaited."""
    x_convergence: Convergence | None = None
    x_dirty_log: DirtyLogInfo | None = None
    x_postcopy: PostcopyStats | None = None
    x_page_map: list[float] | None = None
    """RAM as a row of equal stretches: at the source what is up to date at the destination, there what has
    arrived.
    """
    x_fault_latency: FaultLatency | None = None
    x_received: ReceivedStats | None = None
    x_page_checksums: PageChecksums | None = None
    """With the capability x-page-checksums."""
    x_missing: MissingPages | None = None
    """At the destination of a paused postcopy."""
    x_since: WallClock | None = None
    """Since when the status is what it is, where somebody has to do something."""
    x_next: list[str] | None = None
    """What can be done now: one way each."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            status=value.get("status"),
            ram=None if (got := value.get("ram")) is None else MigrationStats.from_wire(got),
            disk=None if (got := value.get("disk")) is None else MigrationStats.from_wire(got),
            vfio=None if (got := value.get("vfio")) is None else VfioStats.from_wire(got),
            xbzrle_cache=None
            if (got := value.get("xbzrle-cache")) is None
            else XBZRLECacheStats.from_wire(got),
            total_time=value.get("total-time"),
            expected_downtime=value.get("expected-downtime"),
            downtime=value.get("downtime"),
            setup_time=value.get("setup-time"),
            cpu_throttle_percentage=value.get("cpu-throttle-percentage"),
            error_desc=value.get("error-desc"),
            blocked_reasons=value.get("blocked-reasons"),
            postcopy_blocktime=value.get("postcopy-blocktime"),
            postcopy_vcpu_blocktime=value.get("postcopy-vcpu-blocktime"),
            postcopy_latency=value.get("postcopy-latency"),
            postcopy_latency_dist=value.get("postcopy-latency-dist"),
            postcopy_vcpu_latency=value.get("postcopy-vcpu-latency"),
            postcopy_non_vcpu_latency=value.get("postcopy-non-vcpu-latency"),
            compression=None
            if (got := value.get("compression")) is None
            else CompressionStats.from_wire(got),
            socket_address=None
            if (got := value.get("socket-address")) is None
            else [SocketAddress.from_wire(each) for each in got],
            x_convergence=None if (got := value.get("x-convergence")) is None else Convergence.from_wire(got),
            x_dirty_log=None if (got := value.get("x-dirty-log")) is None else DirtyLogInfo.from_wire(got),
            x_postcopy=None if (got := value.get("x-postcopy")) is None else PostcopyStats.from_wire(got),
            x_page_map=value.get("x-page-map"),
            x_fault_latency=None
            if (got := value.get("x-fault-latency")) is None
            else FaultLatency.from_wire(got),
            x_received=None if (got := value.get("x-received")) is None else ReceivedStats.from_wire(got),
            x_page_checksums=None
            if (got := value.get("x-page-checksums")) is None
            else PageChecksums.from_wire(got),
            x_missing=None if (got := value.get("x-missing")) is None else MissingPages.from_wire(got),
            x_since=None if (got := value.get("x-since")) is None else WallClock.from_wire(got),
            x_next=value.get("x-next"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusInfo:
    """The run state in short."""

    running: bool
    """Whether the guest's CPU executes. False, whatever the status, while it waits for a page whose source
    is lost.
    """
    singlestep: bool
    """Whether it executes one instruction at a time; always false."""
    status: RunState
    x_vcpu: str | None = None
    """Where the guest's CPU is, if it neither executes nor has stopped: waiting for a page of its RAM that
    is still at the source of a postcopy.
    """

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            running=value["running"],
            singlestep=value["singlestep"],
            status=value["status"],
            x_vcpu=value.get("x-vcpu"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPanicInformation:
    """What the guest said about its panic."""

    type: GuestPanicInformationType
    arg1: int | None = None
    """A parameter of the guest's panic report."""
    arg2: int | None = None
    """A parameter of the guest's panic report."""
    arg3: int | None = None
    """A parameter of the guest's panic report."""
    arg4: int | None = None
    """A parameter of the guest's panic report."""
    arg5: int | None = None
    """A parameter of the guest's panic report."""

    @classmethod
    def from_wire(cls, value: Wire) -> Self:
        """Of a server's object."""
        return cls(
            type=value["type"],
            arg1=value.get("arg1"),
            arg2=value.get("arg2"),
            arg3=value.get("arg3"),
            arg4=value.get("arg4"),
            arg5=value.get("arg5"),
        )
