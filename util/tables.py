"""Markdown tables and text files."""

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
