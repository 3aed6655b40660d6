"""`pageferry-spool SPOOL URI`: completes a postcopy whose source was killed, from what its keeper has saved.

On the destination `migrate-recover` opens URI first. Afterwards the spool is removed, unless --keep is given.
"""

from __future__ import annotations

import argparse
import os
import sys

from vmm.errors import PageferryError
from vmm.migration.errors import reason
from vmm.migration.spool_send import send_spool

__all__ = ["main"]


def main() -> None:
    """The command. Exit status 1 with the reason if the destination is not complete."""
    parser = argparse.ArgumentParser(prog="pageferry-spool", description=__doc__)
    parser.add_argument("spool", help="the file that x-postcopy-spool-path named")
    parser.add_argument("uri", help="where the destination listens since migrate-recover")
    parser.add_argument("--keep", action="store_true", help="do not remove the spool when it was sent")
    options = parser.parse_args()
    try:
        pages = send_spool(options.spool, options.uri)
    except (PageferryError, OSError) as error:
        sys.exit(f"pageferry-spool: {reason(error)}")
    if not options.keep:
        os.unlink(options.spool)
    print(f"{pages} pages were sent; the destination has everything")


if __name__ == "__main__":
    main()
