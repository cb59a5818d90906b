"""Classes by name: those of a model's data, and ImageNet's descriptions of its folders."""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from itertools import chain

from timm.data import ImageNetInfo

from util.errors import UserError
from util.misc import log


def readable(names: Sequence[str]) -> list[str]:
    """Class names with ImageNet's descriptions in place of its folders' names (n01440764)."""
    info = ImageNetInfo("imagenet-1k")
    if len(names) == 1000 and names[0] == "0":  # a published checkpoint has no class names
        return [info.index_to_description(label) for label in range(1000)]
    known = set(info.label_names())
    return [info.label_name_to_description(name) if name in known else name for name in names]


def composed(name: str) -> str:
    """Return a name in composed Unicode; macOS decomposes the names of files."""
    return unicodedata.normalize("NFC", name)


def comparable(names: Sequence[str]) -> list[str]:
    """Return class names in one spelling, by which those of two sources can be compared.

    That is composed Unicode, without the labels that :class:`util.sources.Rows` puts before names, and without leading
    zeros where all names are numbers.
    """
    digits = len(str(len(names) - 1))
    names = [composed(name) for name in names]
    if all(re.match(f"{label:0{digits}d} .", name) for label, name in enumerate(names)):
        names = [name[digits + 1 :] for name in names]
    return [str(int(name)) for name in names] if all_numbers(names) else names


def all_numbers(names: Sequence[str]) -> bool:
    """Return whether there are names, and all are numbers."""
    return bool(names) and all(name.isdecimal() for name in names)


def find_classes(asked: Sequence[str] | None, names: Sequence[str]) -> list[int]:
    """Return the labels of the classes ``asked`` for (:func:`find_class`); by default of eight."""
    if asked is None:
        count = min(8, len(names))
        return [i * len(names) // count for i in range(count)]
    return [find_class(name, names) for name in asked]


def find_class(asked: str, names: Sequence[str]) -> int:
    """Return the label of the class ``asked`` for by its name, else a part of it between commas, else its number.

    Capitalization decides between names that differ in nothing else. A name that is a number goes before that number.

    Raises:
        UserError: there is no such class, or there are several.
    """
    asked, spelled = composed(asked).strip(), [composed(name).strip() for name in names]
    parts = [[part.strip().lower() for part in name.split(",")] for name in comparable(names)]
    ways = (
        [label for label, name in enumerate(spelled) if name == asked],
        [label for label, name in enumerate(spelled) if name.lower() == asked.lower()],
        [label for label, among in enumerate(parts) if asked.lower() in among],
    )
    found = next((labels for labels in ways if labels), [])
    number = int(asked) if asked.isdecimal() else len(names)
    if number < len(names) and number not in found:
        if ways[0]:
            text = "class %s: the one of this name, number %d, not %s, which has this number"
            log.info(text, asked, found[0], names[number])
        else:
            found = [*found, number]
    if not found:
        close = difflib.get_close_matches(asked.lower(), dict.fromkeys(chain(*parts)), n=4)
        few = f": {', '.join(names)}" if len(names) <= 20 else ""
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {len(names)}, numbered from 0{few}"
        raise UserError(f"no class {asked!r}: {hint}")
    if len(found) > 1:
        several = "; ".join(f"{names[label]} (number {label})" for label in found)
        raise UserError(f"class {asked!r} may be {several}: type a whole name, or a number that is no name")
    return found[0]
