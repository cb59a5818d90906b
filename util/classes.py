"""Classes by name: those of a model's data, and ImageNet's descriptions of its folders."""

import difflib
from collections.abc import Sequence

from timm.data import ImageNetInfo

from util.errors import UserError


def readable(names: Sequence[str]) -> list[str]:
    """Class names with ImageNet's descriptions in place of its folders' names (n01440764)."""
    info = ImageNetInfo("imagenet-1k")
    if len(names) == 1000 and names[0] == "0":  # a published checkpoint has no class names
        return [info.index_to_description(label) for label in range(1000)]
    known = set(info.label_names())
    return [info.label_name_to_description(name) if name in known else name for name in names]


def find_classes(asked: Sequence[str] | None, names: Sequence[str]) -> list[int]:
    """Labels of the classes ``asked`` for by number, name, or part of a name between commas; by default eight."""
    if asked is None:
        count = min(8, len(names))
        return [i * len(names) // count for i in range(count)]
    parts: dict[str, int] = {}
    for label, name in enumerate(names):
        for part in (name, *name.split(",")):
            parts.setdefault(part.strip().lower(), label)
    labels = []
    for name in asked:
        label = parts.get(name.strip().lower(), int(name) if name.isdecimal() else -1)
        if not 0 <= label < len(names):
            close = difflib.get_close_matches(name.lower(), parts, n=4)
            few = f": {', '.join(names)}" if len(names) <= 20 else ""
            hint = f"did you mean {', '.join(close)}?" if close else f"there are {len(names)}, numbered from 0{few}"
            raise UserError(f"no class {name!r}: {hint}")
        labels.append(label)
    return labels
