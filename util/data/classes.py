"""Class names: lookup by name, comparison of data sets, ImageNet's descriptions."""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from util.errors import UserError, some
from util.log import log, warn


def readable(names: Sequence[str]) -> list[str]:
    """Return class names, with ImageNet's descriptions for its folder names (n01440764)."""
    from timm.data import ImageNetInfo  # loads torchvision, which takes longer than torch

    info = ImageNetInfo("imagenet-1k")
    if len(names) == 1000 and names[0] == "0":  # a published checkpoint has no class names
        return [info.index_to_description(label) for label in range(1000)]
    known = set(info.label_names())
    return [info.label_name_to_description(name) if name in known else name for name in names]


def composed(name: str) -> str:
    """Return a name in composed Unicode (NFC). macOS decomposes file names."""
    return unicodedata.normalize("NFC", name)


def normalized_names(names: Sequence[str]) -> list[str]:
    """Return class names in a normalized form, so that two sources can be compared.

    Names are in composed Unicode, without the labels that :class:`util.data.sources.Rows` puts in
    front of them. If all names are numbers, they are without leading zeros.
    """
    digits = len(str(len(names) - 1))
    names = [composed(name) for name in names]
    if all(re.match(f"{label:0{digits}d} .", name) for label, name in enumerate(names)):
        names = [name[digits + 1 :] for name in names]
    return [str(int(name)) for name in names] if all_numbers(names) else names


def all_numbers(names: Sequence[str]) -> bool:
    """Return whether there are names, and all are numbers."""
    return bool(names) and all(name.isdecimal() for name in names)


def find_classes(queries: Sequence[str] | None, names: Sequence[str]) -> list[int]:
    """Return the labels of the ``queries`` (:func:`find_class`); without queries, of 8 classes."""
    if queries is None:
        count = min(8, len(names))
        return [i * len(names) // count for i in range(count)]
    return [find_class(query, names) for query in queries]


def find_class(query: str, names: Sequence[str]) -> int:
    """Return the label of the class that ``query`` denotes.

    The query is a class name, else a part of a name between commas, else a number. Capitalization
    matters only between names that differ in nothing else. If a name is a number, the name has
    precedence over the number.

    Raises:
        UserError: there is no such class, or there are several.
    """
    query = composed(query).strip()
    spelled = [composed(name).strip() for name in names]
    parts = [[part.strip().lower() for part in name.split(",")] for name in normalized_names(names)]
    exact = [label for label, name in enumerate(spelled) if name == query]
    same_letters = [label for label, name in enumerate(spelled) if name.lower() == query.lower()]
    in_parts = [label for label, among in enumerate(parts) if query.lower() in among]
    candidates = exact or same_letters or in_parts
    number = int(query) if query.isdecimal() else len(names)
    if number < len(names) and number not in candidates:
        if exact:
            log.info(
                "class %s: using the class of this name, number %d, not %s, which has this number",
                query,
                candidates[0],
                names[number],
            )
        else:
            candidates = [*candidates, number]
    if not candidates:
        close = difflib.get_close_matches(query.lower(), dict.fromkeys(chain(*parts)), n=4)
        if close:
            hint = f"did you mean {', '.join(close)}?"
        else:
            hint = f"there are {len(names)}, numbered from 0"
            if len(names) == 1:
                hint = "the model has a single class, 0"
            elif len(names) <= 20:
                hint += f": {', '.join(names)}"
        raise UserError(f"no class {query!r}: {hint}")
    if len(candidates) > 1:
        several = "; ".join(f"{names[label]} (number {label})" for label in candidates)
        raise UserError(
            f"class {query!r} may be {several}: type a whole name, or a number that is no name"
        )
    return candidates[0]


def check_classes(
    classes: Sequence[str],
    class_num: int,
    root: str | Path,
    trained: Sequence[str] | None = None,
    held_out: bool = False,
) -> list[int]:
    """Check the ``classes`` of ``root`` against the ``trained`` ones, and return a label for each.

    The label of a training class is its position. For held-out classes it is

    - the label of the trained class of the same name;
    - the number in the name, if held-out names are numbers and trained names are not;
    - the position, if no name is common or the trained names are unknown.

    Raises:
        UserError: there are not ``class_num`` classes, or they differ from the ``trained`` ones.
    """
    own = normalized_names(classes)
    known = normalized_names(trained or [])
    labels = list(range(len(classes)))
    if own == known:
        pass
    elif held_out and all_numbers(own) and not all_numbers(known):
        labels = [int(name) for name in own]
        if len(set(labels)) < len(labels) or max(labels) >= class_num:
            raise UserError(
                f"{root} has classes that are numbers, from {min(labels)} to {max(labels)}: they "
                f"must be different ones of 0 to {class_num - 1}, the labels in training"
            )
        log.info("%s: class names are numbers, and are used as the labels in training", root)
    elif trained is None:
        pass
    elif held_out and sorted(own) == sorted(known):
        labels = [known.index(name) for name in own]
    elif not held_out or set(own) & set(known):
        missing = sorted(set(known) - set(own))
        extra = sorted(set(own) - set(known))
        differences = [f"lacks {some(missing)}"] if missing else []
        differences += [f"also has {some(extra)}"] if extra else []
        message = (
            f"{root} has other classes than the training images: it "
            f"{'; '.join(differences) or 'has them in another order'}"
        )
        if not held_out:
            message += (
                "; to train on these, start from the checkpoint by --finetune in another "
                "--output_dir"
            )
        raise UserError(message)
    elif len(known) == len(own):
        warn(
            "%s has other class names than the training images: classes are matched by position, "
            "%s is %s, ..., %s is %s",
            root,
            classes[0],
            trained[0],
            classes[-1],
            trained[-1],
        )
    if len(classes) != class_num:
        count = len(classes)
        plural = "es" if count > 1 else ""
        remedy = f"pass --class_num {count}"
        if trained and len(trained) == class_num:  # the training images have that many
            remedy = f"put its images into the folders of training, {trained[0]} to {trained[-1]}"
        raise UserError(f"{root} has {count} class{plural}, but class_num is {class_num}: {remedy}")
    return labels
