"""Markdown tables and text files."""

import re
from collections.abc import Sequence
from pathlib import Path

from util.files import written_whole


def markdown(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Return a Markdown table. Floats get four significant digits, None becomes a dash."""

    def cell(value) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell(value) for value in line) + " |\n" for line in lines)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with written_whole(path) as file:
        file.write(text.encode())


def fill(text: str, name: str, content: str) -> str:
    """Replace the text between ``<!-- name -->`` and the next ``<!-- end -->`` by ``content``.

    Raises:
        ValueError: the text has no such markers.
    """
    pattern = re.compile(rf"(<!-- {name} -->).*?(<!-- end -->)", re.DOTALL)
    filled, replacements = pattern.subn(lambda match: match[1] + content + match[2], text)
    if not replacements:
        raise ValueError(f"the text has no marker <!-- {name} --> with an <!-- end -->")
    return filled
