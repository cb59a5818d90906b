"""Markdown tables and text files."""

import re
from collections.abc import Sequence
from pathlib import Path

from util.files import written_whole


def markdown(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table; floats with four significant digits, None as a dash."""

    def cell(value) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell(value) for value in line) + " |\n" for line in lines)


def write_text(path: str | Path, text: str) -> None:
    """Writes text, whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode())


def fill(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- name -->`` and the ``<!-- end -->`` after it.

    Raises:
        ValueError: there is no such place.
    """
    place = re.compile(rf"(<!-- {name} -->).*?(<!-- end -->)", re.DOTALL)
    filled, places = place.subn(lambda match: match[1] + content + match[2], text)
    if not places:
        raise ValueError(f"the text has no place named {name}")
    return filled
