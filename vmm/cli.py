"""The command `pageferry`: reads the command line, goes to the background if asked, and runs the application.

Fast by doing little: what is not needed to refuse an option or to show help is imported later. Until the VM
is up no garbage is looked for: of what is imported nothing ever is, and looking takes a tenth of the start.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

__all__ = ["main"]

EXIT_FAILURE = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until the VM ends; gives the exit status. Errors of the user are one line on stderr."""
    gc.disable()
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    finally:
        gc.enable()


def _main(arguments: Sequence[str]) -> int:
    from vmm.errors import PageferryError
    from vmm.messages import Heading
    from vmm.options import HelpRequested, parse_command_line

    heading = Heading()
    try:
        settings = parse_command_line(arguments, heading)
    except HelpRequested as answer:
        print(answer, end="")
        return 0
    except PageferryError as error:
        print(heading.line(str(error)), file=sys.stderr)
        return EXIT_FAILURE

    from vmm.daemon import Readiness, daemonize

    readiness = daemonize(heading) if settings.daemonize else Readiness(heading)
    try:
        _import_asyncio()
        from vmm.logs import set_up_logs

        set_up_logs(settings, heading)
        from vmm.app import run

        return run(settings, readiness)
    except PageferryError as error:
        readiness.failed(str(error))
    except Exception as error:
        import logging

        logging.getLogger(__name__).debug("a bug", exc_info=True)
        readiness.failed(f"Internal error, please report it: {type(error).__name__}: {error}")
    return EXIT_FAILURE


def _import_asyncio() -> None:
    """Without its TLS, which nothing here speaks: OpenSSL is four megabytes of every VM's memory."""
    if "ssl" in sys.modules:
        return
    sys.modules["ssl"] = None  # type: ignore[assignment]  # import's way to say that there is no such module
    try:
        import asyncio  # noqa: F401 - for what is imported after it
    finally:
        del sys.modules["ssl"]
