"""How two Pageferries recognise each other on a stream that stock QEMU must be able to take.

After OPEN_RETURN_PATH the source sends PING with HELLO_MAGIC. A stock destination answers PONG with the same
number and thinks nothing of it; ours answers that and PONG with ANSWER_MAGIC, which a stock source ignores.
Only a destination that saw the first may send return path messages of our own, only a source that got
the second may send commands of our own: an unknown one kills a stock peer.
"""

from __future__ import annotations

__all__ = ["ANSWER_MAGIC", "HELLO_MAGIC"]

HELLO_MAGIC = 0x50465259
"""The bytes "PFRY"; stock 7.2 sends 1 to 4, 10.2 also 0x42."""

ANSWER_MAGIC = 0x59524650
"""The same backwards."""
