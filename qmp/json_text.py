"""~ One complete JSON text <-> a Python value, with QEMU 7.2's dialect and error texts.

Reading. orjson does the work whenever its verdict can be trusted; the parser written out here takes over
when orjson refuses the text (QEMU's dialect has 'single quotes') or when a key may occur twice, which orjson
keeps silent about. That is decided without parsing: every key owns one colon, so if the number of colons
equals the number of keys in the value there was no duplicate.

Writing. ASCII only, a space after ':' and ',', as QEMU writes. The standard encoder recurses; what is nested
too deeply for it (a client may send an id of depth 1022 and gets it back) is written by a loop.

The parser is iterative too: depth costs memory, never the interpreter's stack.
"""

from __future__ import annotations

import json
import json.encoder
import re
from collections.abc import Callable
from typing import Any, Final

import orjson

from qmp.errors import JsonSyntaxError

__all__ = ["REFUSED", "dump_json", "first_lexical_error", "parse_json", "parse_plain"]

REFUSED: Final = object()
"""What `parse_plain` gives for a text that needs the strict parser."""

_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
# QEMU's lexer: what a token may look like. The order matters: a float before an integer.
_TOKEN = re.compile(
    rb"""[ \t\r\n]*+(?:
      (?P<mark>[{}\[\]:,])
    | (?P<string>"(?:[^"\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+"
                |'(?:[^'\\\x00-\x1f\xfe\xff]++|\\[^\x00-\x1f\xfe\xff])*+')
    | (?P<float>-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++(?:[eE][-+]?[0-9]++)?|[eE][-+]?[0-9]++)(?![0-9.eE+\-]))
    | (?P<integer>-?(?:0|[1-9][0-9]*+)(?![0-9.eE]))
    | (?P<keyword>[a-z]++)
    | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
# The longest valid beginning of a token, plus the byte that spoils it: what QEMU calls stray.
_STRAY = re.compile(
    rb"""[ \t\r\n]*+((?:
      "(?:[^"\\\x00-\x1f\xfe\xff]|\\[^\x00-\x1f\xfe\xff])*+\\?
    | '(?:[^'\\\x00-\x1f\xfe\xff]|\\[^\x00-\x1f\xfe\xff])*+\\?
    | -?(?:(?:0|[1-9][0-9]*+)(?:\.(?:[0-9]++(?:[eE][-+]?)?)?|[eE][-+]?)?)?
    )?.?)""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_SIMPLE_ESCAPES = {
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    '"': '"',
    "'": "'",
    "\\": "\\",
    "/": "/",
}
_KEYWORDS = {b"true": True, b"false": False, b"null": None}
_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1


def parse_plain(text: bytes | bytearray) -> Any:
    """The value of the text if it is plain JSON without duplicate keys, else REFUSED."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return REFUSED
    keys = _count_keys(value)
    if text.count(b":") != keys and _STRINGS.sub(b"", text).count(b":") != keys:
        return REFUSED
    return value


def parse_json(text: bytes | memoryview, colons: int | None = None) -> Any:
    """The value of a text that holds exactly one JSON value; `colons`: how many it has outside strings.

    Raises:
        JsonSyntaxError: the text is not JSON as QEMU 7.2 understands it; the message is QEMU's.
    """
    if colons is None:
        value = parse_plain(bytes(text))
    else:
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            value = REFUSED
        if value is not REFUSED and _count_keys(value) != colons:
            value = REFUSED
    return _parse_strictly(bytes(text)) if value is REFUSED else value


def _count_keys(value: Any) -> int:
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        if type(item) is dict:
            total += len(item)
            for member in item.values():
                if type(member) is dict or type(member) is list:
                    stack.append(member)
        elif type(item) is list:
            stack.extend(member for member in item if type(member) is dict or type(member) is list)
    return total


def _syntax_error(what: str) -> JsonSyntaxError:
    return JsonSyntaxError(f"JSON parse error, {what}")


def _stray(text: bytes, position: int) -> JsonSyntaxError:
    match = _STRAY.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    shown = match[1].decode("utf-8", "replace").partition("\0")[0]
    return _syntax_error(f"stray '{shown}'")


def first_lexical_error(text: bytes) -> JsonSyntaxError:
    """The error for a text whose last byte can belong to no token."""
    position = 0
    while (match := _TOKEN.match(text, position)) is not None and match.lastgroup != "end":
        position = match.end()
    return _stray(text, position)


class _Tokens:
    """The tokens of a text, one ahead."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._position = 0

    def next(self) -> tuple[str, bytes]:
        match = _TOKEN.match(self._text, self._position)
        if match is None:
            raise _stray(self._text, self._position)
        self._position = match.end()
        kind = match.lastgroup
        assert kind is not None, "every alternative has a name"
        return kind, match[kind]


def _parse_strictly(text: bytes) -> Any:
    """Parse as QEMU's recursive parser does, with a list in place of the recursion.

    `open_` holds the containers around the current position: (container, key of the member being read).
    """
    tokens = _Tokens(text)
    open_: list[tuple[Any, str | None]] = []
    kind, token = tokens.next()
    while True:
        if token in (b"{", b"[") and kind == "mark":
            container: Any = {} if token == b"{" else []
            kind, token = tokens.next()
            if token != (b"}" if type(container) is dict else b"]") or kind != "mark":
                key, (kind, token) = _next_key(tokens, container, kind, token)
                open_.append((container, key))
                continue
            value = container
        else:
            value = _scalar(kind, token)
        # A value is complete: put it into its container, and close every container that ends here.
        while True:
            if not open_:
                kind, token = tokens.next()
                if kind != "end":
                    raise _syntax_error("expecting value")
                return value
            container, key = open_.pop()
            _add(container, key, value)
            kind, token = tokens.next()
            closing = b"}" if type(container) is dict else b"]"
            if kind == "mark" and token == closing:
                value = container
                continue
            if kind != "mark" or token != b",":
                raise _syntax_error(f"expected separator in {'dict' if type(container) is dict else 'list'}")
            kind, token = tokens.next()
            key, (kind, token) = _next_key(tokens, container, kind, token)
            open_.append((container, key))
            break


def _next_key(
    tokens: _Tokens, container: Any, kind: str, token: bytes
) -> tuple[str | None, tuple[str, bytes]]:
    """For a dict read `"key":`; give the key and the first token of the value."""
    if type(container) is not dict:
        return None, (kind, token)
    if kind == "string":
        key = _string(token)
    else:
        if kind != "mark" or token not in (b"{", b"["):
            _scalar(kind, token)
        raise _syntax_error("key is not a string in object")
    kind, token = tokens.next()
    if kind != "mark" or token != b":":
        raise _syntax_error("missing : in object pair")
    return key, tokens.next()


def _add(container: Any, key: str | None, value: Any) -> None:
    if key is None:
        container.append(value)
    elif key in container:
        raise _syntax_error("duplicate key")
    else:
        container[key] = value


def _scalar(kind: str, token: bytes) -> Any:
    if kind == "string":
        return _string(token)
    if kind == "integer":
        # A client may send a million digits; int() of those is quadratic and refused by Python.
        number = int(token) if len(token) <= 20 else 1 << 64
        return number if _INT64_MIN <= number <= _UINT64_MAX else _float(token)
    if kind == "float":
        return _float(token)
    if kind == "keyword":
        if token in _KEYWORDS:
            return _KEYWORDS[token]
        raise _syntax_error(f"invalid keyword '{token.decode()}'")
    raise _syntax_error("expecting value")


def _float(token: bytes) -> float:
    number = float(token)
    if number in (float("inf"), float("-inf")):
        # QEMU takes it and echoes `inf`, which is not JSON.
        raise _syntax_error("number out of range")
    return number


def _string(token: bytes) -> str:
    try:
        text = token[1:-1].decode("utf-8")
    except UnicodeDecodeError:
        raise _syntax_error("invalid UTF-8 sequence in string") from None
    if "\\" not in text:
        return text
    parts: list[str] = []
    position = 0
    while (start := text.find("\\", position)) >= 0:
        parts.append(text[position:start])
        match = _ESCAPE.match(text, start)
        assert match is not None, "the lexer lets no backslash end a string"
        position = match.end()
        if match[1] is None:
            if match[2] == "u":
                raise _syntax_error(f"{_quoted(token, start, text)} is not a valid Unicode character")
            if match[2] not in _SIMPLE_ESCAPES:
                raise _syntax_error("invalid escape sequence in string")
            parts.append(_SIMPLE_ESCAPES[match[2]])
            continue
        code = int(match[1], 16)
        if 0xD800 <= code < 0xDC00:
            low = _ESCAPE.match(text, position)
            if low is not None and low[1] is not None and 0xDC00 <= int(low[1], 16) < 0xE000:
                code = 0x10000 + ((code & 0x3FF) << 10) + (int(low[1], 16) & 0x3FF)
                position = low.end()
        if 0xD800 <= code < 0xE000:
            raise _syntax_error(f"\\u{match[1]} is not a valid Unicode character")
        parts.append(chr(code))
    parts.append(text[position:])
    return "".join(parts)


def _quoted(token: bytes, start: int, text: str) -> str:
    """The bad \\u escape as QEMU shows it: six characters, the closing quote included."""
    return (text + chr(token[-1]))[start : start + 6]


def _make_encoder() -> Callable[[Any], str]:
    """What `json.dumps(value, allow_nan=False)` does, made once: a fifth of the time for a small reply."""
    encode = json.JSONEncoder(allow_nan=False)
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # a Python without the C accelerator
        return encode.encode
    chunks = make(None, encode.default, json.encoder.encode_basestring_ascii, None, ": ", ", ", *[False] * 3)
    return lambda value: "".join(chunks(value, 0))


_encode: Final = _make_encoder()


def dump_json(value: Any, *, pretty: bool = False) -> str:
    """The value as ASCII JSON; `pretty` as QEMU's `pretty=on`, four spaces a level."""
    try:
        if pretty:
            return json.dumps(value, allow_nan=False, indent=4)
        return _encode(value)
    except RecursionError:
        return _dump_deep(value)


def _dump_deep(value: Any) -> str:
    out: list[str] = []
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if type(item) is _Literal:
            out.append(item)
        elif type(item) is dict or type(item) is list:
            members: list[Any] = []
            pairs = item.items() if type(item) is dict else ((None, member) for member in item)
            for key, member in pairs:
                lead = ", " if members else ""
                members.append(_Literal(lead if key is None else f"{lead}{json.dumps(key)}: "))
                members.append(member)
            opening, closing = "{}" if type(item) is dict else "[]"
            out.append(opening)
            stack.append(_Literal(closing))
            stack.extend(reversed(members))
        else:
            out.append(json.dumps(item, allow_nan=False))
    return "".join(out)


class _Literal(str):
    """Text that goes to the output as it is."""
