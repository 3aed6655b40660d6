"""The commands of the schema, each a method. Made by tools/client_generator.py."""

from __future__ import annotations

from collections.abc import Sequence

from qmp.client import QmpClient
from vmm.client.base import NOT_GIVEN, NotGiven, given
from vmm.client.types import (
    AddfdInfo,
    BalloonInfo,
    BitmapMigrationNodeAlias,
    BlockInfo,
    ChardevInfo,
    CommandInfo,
    CpuInfoFast,
    DumpGuestMemoryCapability,
    DumpGuestMemoryFormat,
    DumpQueryResult,
    FdsetInfo,
    KeyValue,
    KvmInfo,
    MachineInfo,
    MemoryInfo,
    MigrationCapabilityStatus,
    MigrationInfo,
    MigrationParameters,
    MigrationStatus,
    MultiFDCompression,
    NameInfo,
    QMPCapability,
    RamDigest,
    SchemaInfo,
    StatusInfo,
    StrOrNull,
    TargetInfo,
    UuidInfo,
    VersionInfo,
)

__all__ = ["Commands"]


class Commands:
    """What a client can ask for. The base of `Client`."""

    def __init__(self, qmp: QmpClient) -> None:
        self.qmp = qmp

    async def balloon(self, value: int) -> None:
        """Ask the guest for memory. There is no balloon: always an error of class DeviceNotActive."""
        await self.qmp.execute("balloon", given(value=value))

    async def query_balloon(self) -> BalloonInfo:
        """How much memory the balloon leaves. There is none: always an error of class DeviceNotActive."""
        result = await self.qmp.execute("query-balloon")
        return BalloonInfo.from_wire(result)

    async def send_key(self, keys: list[KeyValue], *, hold_time: int | NotGiven = NOT_GIVEN) -> None:
        """Press keys. There is no keyboard: always an error."""
        await self.qmp.execute("send-key", given(keys=[each.to_wire() for each in keys], hold_time=hold_time))

    async def query_block(self) -> list[BlockInfo]:
        """All disks."""
        result = await self.qmp.execute("query-block")
        return [BlockInfo.from_wire(each) for each in result]

    async def query_chardev(self) -> list[ChardevInfo]:
        """All character devices."""
        result = await self.qmp.execute("query-chardev")
        return [ChardevInfo.from_wire(each) for each in result]

    async def qmp_capabilities(self, *, enable: list[QMPCapability] | NotGiven = NOT_GIVEN) -> None:
        """Complete the negotiation and enable capabilities that the greeting offered. The first command of
        every session; until then no other is accepted and no event is sent.
        """
        await self.qmp.execute("qmp_capabilities", given(enable=enable))

    async def query_version(self) -> VersionInfo:
        """The version of this monitor."""
        result = await self.qmp.execute("query-version")
        return VersionInfo.from_wire(result)

    async def query_commands(self) -> list[CommandInfo]:
        """All commands."""
        result = await self.qmp.execute("query-commands")
        return [CommandInfo.from_wire(each) for each in result]

    async def quit(self) -> None:
        """End the process. The event SHUTDOWN comes before the reply, then the connection is closed."""
        await self.qmp.execute("quit")

    async def getfd(self, fdname: str, *, fds: Sequence[int] = ()) -> None:
        """Give the file descriptor that was passed with SCM_RIGHTS a name, to be used as fd:NAME. One that
        has the name is closed.
        """
        await self.qmp.execute("getfd", given(fdname=fdname), fds=fds)

    async def closefd(self, fdname: str) -> None:
        """Close a file descriptor named with getfd."""
        await self.qmp.execute("closefd", given(fdname=fdname))

    async def add_fd(
        self,
        *,
        fdset_id: int | NotGiven = NOT_GIVEN,
        opaque: str | NotGiven = NOT_GIVEN,
        fds: Sequence[int] = (),
    ) -> AddfdInfo:
        """Put the file descriptor that was passed with SCM_RIGHTS into a set. The sets belong to all
        clients together and are emptied when the last one has disconnected.
        """
        result = await self.qmp.execute("add-fd", given(fdset_id=fdset_id, opaque=opaque), fds=fds)
        return AddfdInfo.from_wire(result)

    async def remove_fd(self, fdset_id: int, *, fd: int | NotGiven = NOT_GIVEN) -> None:
        """Close a file descriptor of a set, or all of them."""
        await self.qmp.execute("remove-fd", given(fdset_id=fdset_id, fd=fd))

    async def query_fdsets(self) -> list[FdsetInfo]:
        """All sets of file descriptors."""
        result = await self.qmp.execute("query-fdsets")
        return [FdsetInfo.from_wire(each) for each in result]

    async def human_monitor_command(self, command_line: str, *, cpu_index: int | NotGiven = NOT_GIVEN) -> str:
        """Execute a line of the human monitor and give what it prints, lines ended by CR LF."""
        result: str = await self.qmp.execute(
            "human-monitor-command", given(command_line=command_line, cpu_index=cpu_index)
        )
        return result

    async def dump_guest_memory(
        self,
        paging: bool,
        protocol: str,
        *,
        detach: bool | NotGiven = NOT_GIVEN,
        begin: int | NotGiven = NOT_GIVEN,
        length: int | NotGiven = NOT_GIVEN,
        format_: DumpGuestMemoryFormat | NotGiven = NOT_GIVEN,
    ) -> None:
        """Dump guest memory and the CPU's state to an ELF core file. The guest stands still meanwhile.
        Refused during a migration, and for pages that are still at its source.
        """
        await self.qmp.execute(
            "dump-guest-memory",
            given(
                paging=paging, protocol=protocol, detach=detach, begin=begin, length=length, format_=format_
            ),
        )

    async def query_dump(self) -> DumpQueryResult:
        """The latest dump."""
        result = await self.qmp.execute("query-dump")
        return DumpQueryResult.from_wire(result)

    async def query_dump_guest_memory_capability(self) -> DumpGuestMemoryCapability:
        """What dumps can be had."""
        result = await self.qmp.execute("query-dump-guest-memory-capability")
        return DumpGuestMemoryCapability.from_wire(result)

    async def query_qmp_schema(self) -> list[SchemaInfo]:
        """The schema of all commands and events."""
        result = await self.qmp.execute("query-qmp-schema")
        return [SchemaInfo.from_wire(each) for each in result]

    async def query_name(self) -> NameInfo:
        """The name of the guest."""
        result = await self.qmp.execute("query-name")
        return NameInfo.from_wire(result)

    async def query_uuid(self) -> UuidInfo:
        """The UUID of the guest."""
        result = await self.qmp.execute("query-uuid")
        return UuidInfo.from_wire(result)

    async def query_kvm(self) -> KvmInfo:
        """Whether KVM is used: here never."""
        result = await self.qmp.execute("query-kvm")
        return KvmInfo.from_wire(result)

    async def query_machines(self) -> list[MachineInfo]:
        """The types of machine that can be built."""
        result = await self.qmp.execute("query-machines")
        return [MachineInfo.from_wire(each) for each in result]

    async def query_target(self) -> TargetInfo:
        """The architecture that is emulated."""
        result = await self.qmp.execute("query-target")
        return TargetInfo.from_wire(result)

    async def query_cpus_fast(self) -> list[CpuInfoFast]:
        """The virtual CPUs; does not disturb them."""
        result = await self.qmp.execute("query-cpus-fast")
        return [CpuInfoFast.from_wire(each) for each in result]

    async def query_memory_size_summary(self) -> MemoryInfo:
        """The size of guest RAM."""
        result = await self.qmp.execute("query-memory-size-summary")
        return MemoryInfo.from_wire(result)

    async def pmemsave(self, val: int, size: int, filename: str) -> None:
        """Save a portion of guest physical memory to a file."""
        await self.qmp.execute("pmemsave", given(val=val, size=size, filename=filename))

    async def memsave(
        self, val: int, size: int, filename: str, *, cpu_index: int | NotGiven = NOT_GIVEN
    ) -> None:
        """Save a portion of guest virtual memory to a file, by the page tables in use."""
        await self.qmp.execute("memsave", given(val=val, size=size, filename=filename, cpu_index=cpu_index))

    async def x_query_ram_digest(self) -> list[RamDigest]:
        """What each RAM block holds, in one number each. Two machines are equal when these are."""
        result = await self.qmp.execute("x-query-ram-digest")
        return [RamDigest.from_wire(each) for each in result]

    async def migrate(
        self,
        uri: str,
        *,
        blk: bool | NotGiven = NOT_GIVEN,
        inc: bool | NotGiven = NOT_GIVEN,
        detach: bool | NotGiven = NOT_GIVEN,
        resume: bool | NotGiven = NOT_GIVEN,
    ) -> None:
        """Start a migration to URI, or with resume go on with a paused postcopy. The reply comes at once;
        query-migrate and events tell how it goes.
        """
        await self.qmp.execute("migrate", given(uri=uri, blk=blk, inc=inc, detach=detach, resume=resume))

    async def migrate_incoming(self, uri: str, *, exit_on_error: bool | NotGiven = NOT_GIVEN) -> None:
        """Wait for a migration on URI; the process was started with -incoming defer."""
        await self.qmp.execute("migrate-incoming", given(uri=uri, exit_on_error=exit_on_error))

    async def migrate_cancel(self) -> None:
        """Cancel the migration; the guest goes on at the source. Harmless if there is none."""
        await self.qmp.execute("migrate_cancel")

    async def migrate_start_postcopy(self) -> None:
        """Switch the migration to postcopy. The capability postcopy-ram must have been on when it started."""
        await self.qmp.execute("migrate-start-postcopy")

    async def migrate_continue(self, state: MigrationStatus) -> None:
        """Go on with a migration that stands still in a state."""
        await self.qmp.execute("migrate-continue", given(state=state))

    async def migrate_recover(self, uri: str, *, oob: bool = False) -> None:
        """At the destination of a paused postcopy: wait for the source on a new URI."""
        await self.qmp.execute("migrate-recover", given(uri=uri), oob=oob)

    async def migrate_pause(self, *, oob: bool = False) -> None:
        """Pause a postcopy migration by cutting its channels."""
        await self.qmp.execute("migrate-pause", oob=oob)

    async def x_migrate_take_back(self, destination_is_gone: bool) -> None:
        """At a source that has handed its guest over: the destination is gone for good. What the guest did
        there is lost; cont then runs it here as it was at the hand-over. Refused while the connection
        stands.
        """
        await self.qmp.execute("x-migrate-take-back", given(destination_is_gone=destination_is_gone))

    async def migrate_set_capabilities(self, capabilities: list[MigrationCapabilityStatus]) -> None:
        """Turn capabilities on or off; not while a migration runs."""
        await self.qmp.execute(
            "migrate-set-capabilities", given(capabilities=[each.to_wire() for each in capabilities])
        )

    async def query_migrate_capabilities(self) -> list[MigrationCapabilityStatus]:
        """All capabilities."""
        result = await self.qmp.execute("query-migrate-capabilities")
        return [MigrationCapabilityStatus.from_wire(each) for each in result]

    async def migrate_set_parameters(
        self,
        *,
        announce_initial: int | NotGiven = NOT_GIVEN,
        announce_max: int | NotGiven = NOT_GIVEN,
        announce_rounds: int | NotGiven = NOT_GIVEN,
        announce_step: int | NotGiven = NOT_GIVEN,
        compress_level: int | NotGiven = NOT_GIVEN,
        compress_threads: int | NotGiven = NOT_GIVEN,
        compress_wait_thread: bool | NotGiven = NOT_GIVEN,
        decompress_threads: int | NotGiven = NOT_GIVEN,
        throttle_trigger_threshold: int | NotGiven = NOT_GIVEN,
        cpu_throttle_initial: int | NotGiven = NOT_GIVEN,
        cpu_throttle_increment: int | NotGiven = NOT_GIVEN,
        cpu_throttle_tailslow: bool | NotGiven = NOT_GIVEN,
        tls_creds: StrOrNull | NotGiven = NOT_GIVEN,
        tls_hostname: StrOrNull | NotGiven = NOT_GIVEN,
        tls_authz: StrOrNull | NotGiven = NOT_GIVEN,
        max_bandwidth: int | NotGiven = NOT_GIVEN,
        downtime_limit: int | NotGiven = NOT_GIVEN,
        x_checkpoint_delay: int | NotGiven = NOT_GIVEN,
        block_incremental: bool | NotGiven = NOT_GIVEN,
        multifd_channels: int | NotGiven = NOT_GIVEN,
        xbzrle_cache_size: int | NotGiven = NOT_GIVEN,
        max_postcopy_bandwidth: int | NotGiven = NOT_GIVEN,
        max_cpu_throttle: int | NotGiven = NOT_GIVEN,
        multifd_compression: MultiFDCompression | NotGiven = NOT_GIVEN,
        multifd_zlib_level: int | NotGiven = NOT_GIVEN,
        multifd_zstd_level: int | NotGiven = NOT_GIVEN,
        block_bitmap_mapping: list[BitmapMigrationNodeAlias] | NotGiven = NOT_GIVEN,
        x_postcopy_start_time: int | NotGiven = NOT_GIVEN,
        x_postcopy_spool_path: str | NotGiven = NOT_GIVEN,
        x_handshake_timeout: int | NotGiven = NOT_GIVEN,
        x_peer_timeout: int | NotGiven = NOT_GIVEN,
    ) -> None:
        """Set parameters; max-bandwidth, downtime-limit and max-postcopy-bandwidth act on a running
        migration.
        """
        await self.qmp.execute(
            "migrate-set-parameters",
            given(
                announce_initial=announce_initial,
                announce_max=announce_max,
                announce_rounds=announce_rounds,
                announce_step=announce_step,
                compress_level=compress_level,
                compress_threads=compress_threads,
                compress_wait_thread=compress_wait_thread,
                decompress_threads=decompress_threads,
                throttle_trigger_threshold=throttle_trigger_threshold,
                cpu_throttle_initial=cpu_throttle_initial,
                cpu_throttle_increment=cpu_throttle_increment,
                cpu_throttle_tailslow=cpu_throttle_tailslow,
                tls_creds=tls_creds,
                tls_hostname=tls_hostname,
                tls_authz=tls_authz,
                max_bandwidth=max_bandwidth,
                downtime_limit=downtime_limit,
                x_checkpoint_delay=x_checkpoint_delay,
                block_incremental=block_incremental,
                multifd_channels=multifd_channels,
                xbzrle_cache_size=xbzrle_cache_size,
                max_postcopy_bandwidth=max_postcopy_bandwidth,
                max_cpu_throttle=max_cpu_throttle,
                multifd_compression=multifd_compression,
                multifd_zlib_level=multifd_zlib_level,
                multifd_zstd_level=multifd_zstd_level,
                block_bitmap_mapping=block_bitmap_mapping
                if isinstance(block_bitmap_mapping, NotGiven)
                else [each.to_wire() for each in block_bitmap_mapping],
                x_postcopy_start_time=x_postcopy_start_time,
                x_postcopy_spool_path=x_postcopy_spool_path,
                x_handshake_timeout=x_handshake_timeout,
                x_peer_timeout=x_peer_timeout,
            ),
        )

    async def query_migrate_parameters(self) -> MigrationParameters:
        """All parameters."""
        result = await self.qmp.execute("query-migrate-parameters")
        return MigrationParameters.from_wire(result)

    async def query_migrate(self) -> MigrationInfo:
        """How the migration goes."""
        result = await self.qmp.execute("query-migrate")
        return MigrationInfo.from_wire(result)

    async def query_status(self) -> StatusInfo:
        """The run state."""
        result = await self.qmp.execute("query-status")
        return StatusInfo.from_wire(result)

    async def stop(self) -> None:
        """Stop the guest's CPU. The event STOP tells when it was done; harmless if it is stopped. Never
        waits: a CPU that waits for a page stops within the instruction, and what the guest said
        meanwhile is heard after cont.
        """
        await self.qmp.execute("stop")

    async def cont(self) -> None:
        """Let the guest's CPU run. During an incoming migration it runs as soon as the migration is
        complete.
        """
        await self.qmp.execute("cont")

    async def system_reset(self) -> None:
        """Reset the machine, as the reset button does."""
        await self.qmp.execute("system_reset")

    async def inject_nmi(self) -> None:
        """Inject a non-maskable interrupt into the guest's CPU."""
        await self.qmp.execute("inject-nmi")

    async def system_powerdown(self) -> None:
        """Press the power button, and send the event POWERDOWN. A Linux guest is told of it by ACPI; what
        it does then is its user's choice.
        """
        await self.qmp.execute("system_powerdown")
