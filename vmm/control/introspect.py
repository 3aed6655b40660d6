"""Handlers of schema/introspect.json."""

from __future__ import annotations

from functools import cache

from qmp.dispatcher import Dispatcher, Handler
from qmp.introspect import introspection_text
from qmp.session import RawJson

__all__ = ["handlers"]


def handlers(dispatcher: Dispatcher) -> dict[str, Handler]:
    """Command name -> handler."""

    @cache
    def text() -> RawJson:
        return introspection_text(dispatcher.schema, dispatcher.names)

    return {"query-qmp-schema": lambda call: text()}
