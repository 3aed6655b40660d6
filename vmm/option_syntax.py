"""QEMU's syntax of option values: `first,key=value,key=value`, with `,,` for a comma, or a JSON object.

    value     = "{" JSON object "}"  |  item ("," item)*
    item      = key "=" text  |  text          the first text without "=" is the implied key's value;
                                               any other one is a switch: `wait` is wait=on, `nowait` off
    ,,        a comma inside of a text

Pure: text in, values out, OptionError for all else. Source: QEMU `util/keyval.c`, `util/qemu-option.c`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vmm.errors import OptionError

__all__ = [
    "Key",
    "Keys",
    "accepted",
    "parse_choice",
    "parse_items",
    "parse_keys",
    "parse_number",
    "parse_size",
]

SIZE_SUFFIXES = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_ON = ("on", "yes", "true", "y")
_OFF = ("off", "no", "false", "n")


@dataclass(frozen=True)
class Key:
    """One key of an option: how its text becomes a value, and its line in the help.

    `kind` is "text", "bool", "number", "size" (bytes) or "a|b|c" (one of these words).
    """

    kind: str
    help: str = ""


Keys = Mapping[str, Key]


def accepted(names: Iterable[str], wrong: str = "") -> str:
    """`accepted: a, b, c`, with the likely meant one first asked for."""
    listed = sorted(names)
    near: list[str] = []
    if wrong:
        import difflib  # needed for errors only

        near = difflib.get_close_matches(wrong, listed, 1)
    return (f"did you mean '{near[0]}'? " if near else "") + f"accepted: {', '.join(listed) or 'nothing'}"


def split_commas(text: str) -> list[str]:
    """The items of a value; `,,` is a comma within one."""
    items = [""]
    index = 0
    while index < len(text):
        if text[index] != ",":
            items[-1] += text[index]
        elif text[index + 1 : index + 2] == ",":
            items[-1] += ","
            index += 1
        else:
            items.append("")
        index += 1
    return items


def parse_items(text: str, implied: str | None, keys: Keys) -> list[tuple[str, object]]:
    """The (key, raw value) pairs in order. Raises OptionError for bad JSON or a key that is not there."""
    if text.startswith("{"):
        return _parse_json(text)
    items: list[tuple[str, object]] = []
    for number, item in enumerate(split_commas(text)):
        key, equals, value = item.partition("=")
        # `foo=bar` in first place names a key, known or not; a path with a '=' in it is the implied value.
        if number == 0 and implied is not None and not (equals and (key in keys or key.isidentifier())):
            items.append((implied, item))
        elif equals:
            items.append((key, value))
        elif item:
            items.append(_switch(item, keys))
    return items


def _switch(item: str, keys: Keys) -> tuple[str, object]:
    if item in keys and keys[item].kind == "bool":
        return item, "on"
    if item.startswith("no") and item[2:] in keys and keys[item[2:]].kind == "bool":
        return item[2:], "off"
    if item in keys:
        raise OptionError(f"Expected '=' after parameter '{item}'")
    if item in ("help", "?"):
        return "help", "on"
    raise OptionError(f"Invalid parameter '{item}'; {accepted(keys, item)}")


def _parse_json(text: str) -> list[tuple[str, object]]:
    import json  # only this form needs it

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"Invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise OptionError("Invalid JSON: expected an object")
    return list(value.items())


def parse_keys(text: str, implied: str | None, keys: Keys) -> dict[str, int | str | bool]:
    """The values by key; a later one wins, as in QEMU. Raises OptionError: unknown key, or a bad value."""
    values: dict[str, int | str | bool] = {}
    for key, raw in parse_items(text, implied, keys):
        if key not in keys:
            raise OptionError(f"Invalid parameter '{key}'; {accepted(keys, key)}")
        values[key] = convert(key, keys[key].kind, raw)
    return values


def convert(name: str, kind: str, raw: object) -> int | str | bool:
    """A raw value (text, or what JSON gave) as its kind. Raises OptionError."""
    if isinstance(raw, bool):
        raw = "on" if raw else "off"
    elif isinstance(raw, int):
        raw = str(raw)
    elif not isinstance(raw, str):
        raise OptionError(f"Parameter '{name}' expects a {'string' if kind == 'text' else kind}")
    parser = _PARSERS.get(kind)
    return parse_choice(name, raw, kind.split("|")) if parser is None else parser(name, raw)


def parse_bool(name: str, text: str) -> bool:
    """`on` or `off`, and QEMU's other spellings of them."""
    if text in _ON:
        return True
    if text in _OFF:
        return False
    raise OptionError(f"Parameter '{name}' expects 'on' or 'off', got '{text}'")


def parse_number(name: str, text: str) -> int:
    """A decimal, hexadecimal (0x) or octal (leading 0) number below 2^64."""
    digits = text.strip()
    try:
        number = int(digits, 8) if digits[:1] == "0" and digits.isdigit() else int(digits, 0)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 64 or "_" in digits:
        raise OptionError(f"Parameter '{name}' expects a non-negative number below 2^64, got '{text}'")
    return number


def parse_size(name: str, text: str, default_suffix: str = "B") -> int:
    """A size in bytes: a number, perhaps with a fraction, and a suffix K, M, G, T, P or E (of 1024)."""
    digits = text.rstrip("BbKkMmGgTtPpEe") if not text.lower().startswith("0x") else text
    suffix = text[len(digits) :].upper() or default_suffix
    if suffix in SIZE_SUFFIXES and digits.lower().startswith("0x"):
        return parse_number(name, digits)
    whole, dot, fraction = digits.partition(".")
    if suffix in SIZE_SUFFIXES and (whole + fraction).isascii() and (whole + fraction).isdigit() and whole:
        scale = 1 << SIZE_SUFFIXES[suffix]
        size = int(whole) * scale + (int(fraction) * scale // 10 ** len(fraction) if dot and fraction else 0)
        if size < 1 << 64:
            return size
    raise OptionError(
        f"Parameter '{name}' expects a size below 2^64 with a suffix k, M, G, T, P or E, got '{text}'"
    )


def parse_choice(name: str, text: str, words: Iterable[str]) -> str:
    """One of `words`."""
    words = list(words)
    if text not in words:
        raise OptionError(f"Parameter '{name}' does not accept value '{text}'; {accepted(words, text)}")
    return text


_PARSERS: dict[str, Callable[[str, str], int | str | bool]] = {
    "text": lambda name, text: text,
    "bool": parse_bool,
    "number": parse_number,
    "size": parse_size,
}
