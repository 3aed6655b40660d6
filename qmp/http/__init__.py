"""QMP over HTTP: `/qmp` as a WebSocket, the vocabulary and its reference, and read-only pages of the owner's.

Reading order: `guard` (which requests are served), `reference` (the vocabulary as HTML), `websocket` (one QMP
client), `feed` (values that a browser watches), and last `gateway`. This package alone imports aiohttp, which
takes a quarter of a second: import `gateway` only when somebody wants it.
"""
