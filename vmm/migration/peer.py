"""How two Pageferries recognise each other, and what they say that stock QEMU does not know.

After OPEN_RETURN_PATH the source sends PING with HELLO_MAGIC. A stock destination answers PONG with the same
number and thinks nothing of it; ours first says PONG with ANSWER_MAGIC, which a stock source ignores. So the
source knows its peer when HELLO_MAGIC comes back. Only a destination that saw the first may send return path
messages of our own, only a source that got the second may send commands of our own: an unknown one kills a
stock peer.

    SOURCE                                              DESTINATION
    X_HAND_OVER name  ------------------------------->  from here on neither RUN nor EOF starts the guest
    last pages, device state, EOF or the package  --->
               <-------------------------------  X_LOADED  all that a start needs is here
    may still be cancelled: X_KEEP  ----------------->  forget it
    *hand-over*  X_START  --------------------------->  start the guest
               <-------------------------------  X_STARTED
    after a cut, on a new connection:
    X_ASK name  ------------------------------------->
               <-------------------------------  X_FATE
"""

from __future__ import annotations

from enum import Enum

__all__ = ["ALIVE_MAGIC", "ANSWER_MAGIC", "HELLO_MAGIC", "Fate"]

HELLO_MAGIC = 0x50465259
"""The bytes "PFRY"; stock 7.2 sends 1 to 4, 10.2 also 0x42."""

ANSWER_MAGIC = 0x59524650
"""The same backwards."""

ALIVE_MAGIC = 0x50464C56
"""The bytes "PFLV": a PING or a PONG that says nothing but that somebody is there (`silence.py`)."""


class Fate(Enum):
    """What became of a migration at its destination; the values are on the wire.

    A destination says NOT_STARTED only of a guest that it has forgotten: it can never start it after that.
    """

    UNKNOWN = 0
    """Never heard of it, or another process did: the guest may have run there, and died with it."""
    NOT_STARTED = 1
    STARTED = 2
    """It runs, or is paused, with pages missing."""
    COMPLETE = 3
    """The whole guest is there."""
