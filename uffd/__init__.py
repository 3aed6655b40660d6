"""The kernel's memory interface: userfaultfd, the pagemap, and memory at fixed addresses.

Knows nothing of virtual machines. Start at `probe()`, which says what this kernel lets this user do.
"""

from uffd.bits import BitWords, set_bits, take_bits
from uffd.errors import (
    AlreadyPresent,
    AlreadyRegistered,
    KernelRefused,
    NotRegistered,
    OutOfMemory,
    UffdError,
    UffdUnavailable,
)
from uffd.mapping import PAGE_SIZE_BYTES, Mapping, MappingKind
from uffd.pagemap import PagemapScanner, is_swap_configured
from uffd.probe import Probe, probe
from uffd.protect_log import ProtectLog
from uffd.userfaultfd import Fault, Features, Mode, Placed, Userfaultfd

__all__ = [
    "PAGE_SIZE_BYTES",
    "AlreadyPresent",
    "AlreadyRegistered",
    "BitWords",
    "Fault",
    "Features",
    "KernelRefused",
    "Mapping",
    "MappingKind",
    "Mode",
    "NotRegistered",
    "OutOfMemory",
    "PagemapScanner",
    "Placed",
    "Probe",
    "ProtectLog",
    "UffdError",
    "UffdUnavailable",
    "Userfaultfd",
    "is_swap_configured",
    "probe",
    "set_bits",
    "take_bits",
]
