"""What a user can do about a migration that has stopped, in words: figures in, sentences out.

The sentences name commands by their QMP names. They are shown as query-migrate's `x-next`.
"""

from __future__ import annotations

from vmm.migration.status import MigrationStatus

__all__ = ["next_at_destination", "next_at_source"]

_S = MigrationStatus

RESUME = "migrate-recover at the destination with a new URI, then migrate to it here with resume=true"
TAKE_BACK = (
    "if the destination is gone for good: x-migrate-take-back with destination-is-gone=true, then cont; "
    "what the guest did there is lost"
)
PAUSE = "migrate-pause ends an attempt to recover that hangs"


def next_at_source(status: MigrationStatus, *, handed_over: bool) -> list[str]:
    """`handed_over`: the guest may run at the destination, for all that is known here."""
    match status:
        case _S.POSTCOPY_PAUSED:
            return [RESUME, TAKE_BACK]
        case _S.POSTCOPY_RECOVER:
            return [PAUSE]
        case _S.FAILED if handed_over:
            return ["if the guest runs at the destination: quit here", TAKE_BACK]
        case _S.FAILED:
            return ["the guest is here; migrate may be tried again"]
        case _:
            return []


def next_at_destination(status: MigrationStatus, *, listening: bool, recovering: bool) -> list[str]:
    """`listening`: for another source; `recovering`: migrate-recover has opened an address."""
    match status:
        case _S.POSTCOPY_PAUSED if recovering:
            return ["migrate at the source to socket-address with resume=true"]
        case _S.POSTCOPY_PAUSED:
            return [
                "migrate-recover here with a new URI, then migrate to it at the source with resume=true",
                "if the source is gone for good, the pages that are missing are lost with it: quit",
            ]
        case _S.POSTCOPY_RECOVER:
            return [PAUSE]
        case _S.FAILED if listening:
            return ["nothing of the attempt is left; a source may come to the same address again"]
        case _S.FAILED:
            return ["nothing of the attempt is left; migrate-incoming may be tried again"]
        case _:
            return []
