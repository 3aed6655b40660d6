"""The typed client: every command a method, every reply and event a dataclass.

    async with await Client.connect("/run/qmp") as vm:
        events = vm.events()
        await vm.migrate("unix:/run/migration")
        async for event in events:
            if isinstance(event, MigrationEvent) and event.status == "completed":
                print((await vm.query_migrate()).total_time)

Errors are those of `qmp.client`: CommandFailed, Disconnected, OSError. types.py, events.py and commands.py
are made from the schema by tools/client_generator.py: change those.
"""

from vmm.client import events, types
from vmm.client.base import NOT_GIVEN, Event, NotGiven, UnknownEvent, Wire
from vmm.client.connection import Client, Events, event_from_wire
from vmm.client.events import *  # noqa: F403  # each event by its name
from vmm.client.types import *  # noqa: F403  # each type by its name

__all__ = [
    "NOT_GIVEN",
    "Client",
    "Event",
    "Events",
    "NotGiven",
    "UnknownEvent",
    "Wire",
    "event_from_wire",
]
__all__ += events.__all__
__all__ += types.__all__
