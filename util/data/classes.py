"""Classes by name: those of a model's data, and ImageNet's descriptions of its folders."""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from util.errors import UserError, some
from util.log import log, warn


def readable(names: Sequence[str]) -> list[str]:
    """Class names with ImageNet's descriptions in place of its folders' names (n01440764)."""
    from timm.data import ImageNetInfo  # loads torchvision, which takes longer than torch

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

    That is composed Unicode, without the labels that :class:`util.data.sources.Rows` puts before names, and without leading
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
        hint = (
            f"did you mean {', '.join(close)}?"
            if close
            else f"there are {len(names)}, numbered from 0{few}"
        )
        raise UserError(f"no class {asked!r}: {hint}")
    if len(found) > 1:
        several = "; ".join(f"{names[label]} (number {label})" for label in found)
        raise UserError(
            f"class {asked!r} may be {several}: type a whole name, or a number that is no name"
        )
    return found[0]


def check_classes(
    classes: Sequence[str],
    class_num: int,
    root: str | Path,
    trained: Sequence[str] | None = None,
    held_out: bool = False,
) -> list[int]:
    """Check ``root``'s ``classes`` against those that were ``trained``, and return the label of each.

    That is the position of the class. Of held-out classes it is the label of the trained class of that name, or the
    number that the name is where trained classes have other names; if no name is common, positions count.

    Raises:
        UserError: the classes are not ``class_num``, or not those that were ``trained``.
    """
    own, known = comparable(classes), comparable(trained or [])
    labels = list(range(len(classes)))
    if own == known:
        pass
    elif held_out and all_numbers(own) and not all_numbers(known):
        labels = [int(name) for name in own]
        if len(set(labels)) < len(labels) or max(labels) >= class_num:
            what = f"{root} has classes that are numbers, from {min(labels)} to {max(labels)}"
            raise UserError(
                f"{what}: they must be different ones of 0 to {class_num - 1}, the labels in training"
            )
        log.info("%s: names of classes are numbers, and read as the labels in training", root)
    elif trained is None:
        pass
    elif held_out and sorted(own) == sorted(known):
        labels = [known.index(name) for name in own]
    elif not held_out or set(own) & set(known):
        sides = {"lacks": set(known) - set(own), "has besides": set(own) - set(known)}
        what = "; ".join(f"{verb} {some(sorted(names))}" for verb, names in sides.items() if names)
        what = f"{root} has other classes than the training images: it {what or 'orders them otherwise'}"
        hint = (
            "; to train on these, start from the checkpoint by --finetune in another --output_dir"
        )
        raise UserError(what if held_out else what + hint)
    elif len(known) == len(own):
        text = "%s has other names of classes than the training images: their order counts, %s is %s, ..., %s is %s"
        warn(text, root, classes[0], trained[0], classes[-1], trained[-1])
    if len(classes) != class_num:
        count, plural = len(classes), "es" if len(classes) > 1 else ""
        raise UserError(
            f"{root} has {count} class{plural}, but class_num is {class_num}: pass --class_num {count}"
        )
    return labels
