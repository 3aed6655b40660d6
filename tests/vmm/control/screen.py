"""A terminal of one line after another, as far as the human monitor uses it."""

from __future__ import annotations

import re

__all__ = ["rendered"]

_PART = re.compile(r"\x1b\[(?P<sequence>[CDK])|(?P<control>[\r\n])|(?P<text>[^\x1b\r\n]+)")


def rendered(output: str) -> list[str]:
    """The lines on the screen, the cursor shown as a bar in the last.

    Raises ValueError for any other sequence.
    """
    lines, row, column = [""], 0, 0
    position = 0
    while position < len(output):
        match = _PART.match(output, position)
        if match is None:
            raise ValueError(f"not understood: {output[position:][:10]!r}")
        position = match.end()
        line = lines[row]
        if match["text"]:
            lines[row] = line[:column].ljust(column) + match["text"] + line[column + len(match["text"]) :]
            column += len(match["text"])
        elif match["control"] == "\r":
            column = 0
        elif match["control"] == "\n":
            lines.append("")
            row += 1
        elif match["sequence"] == "K":
            lines[row] = line[:column]
        else:
            column = max(0, column + (1 if match["sequence"] == "C" else -1))
    last = lines.pop().ljust(column)
    return [*(line.rstrip(" ") for line in lines), f"{last[:column]}|{last[column:]}"]
