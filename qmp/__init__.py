"""A QMP server as a library: it knows the protocol, the schema and the sockets, and nothing of VMs.

Reading order: `errors`, `json_text` and `json_stream` (bytes to messages), `session` (the protocol without
I/O), `schema` and `dispatcher` (from a request to a handler), `events`, and last `connection` and `server`.
"""
