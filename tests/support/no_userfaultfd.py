"""Becomes another program, in which the system call userfaultfd fails with EPERM, as in many containers.

    python -m tests.support.no_userfaultfd PROGRAM ARGUMENT ...

A seccomp filter of four instructions, see Documentation/userspace-api/seccomp_filter.rst of Linux. It holds
for x86-64 only, as the project does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

__all__ = ["forbid_userfaultfd"]

PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
NR_USERFAULTFD = 323

LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
"""BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K."""


def forbid_userfaultfd() -> None:
    """From here on, in this process and its children. Raises OSError."""
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (LOAD_WORD, 0, 0, 0),  # seccomp_data.nr
            (JUMP_IF_EQUAL, 0, 1, NR_USERFAULTFD),
            (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM),
            (RETURN, 0, 0, SECCOMP_RET_ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    filter_program = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(filter_program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "The seccomp filter was not taken")


if __name__ == "__main__":
    forbid_userfaultfd()
    os.execv(sys.argv[1], sys.argv[1:])
