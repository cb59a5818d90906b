"""Where images come from: folders of files, or rows of a data set that Hugging Face's ``datasets`` opens."""

import io
import math
import os
import re
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from util.errors import UserError, reason
from util.misc import is_main_process, log

#: The one class of images that have none: a folder of caches, and the label 0.
UNLABELED = "images"
#: What splits are called: in flags, and in data sets.
SPLITS = {"train": ("train",), "val": ("validation", "val", "valid")}
#: What columns of images and labels hold, and what they are called, the likeliest first.
COLUMNS = {
    "image": (("images", "bytes"), ("image", "img")),
    "label": (("classes", "integers"), ("label", "labels", "class", "class_id", "target")),
}
#: ``hf://datasets/owner/name[@revision][/configuration]``; of the two slashes pathlib leaves one.
ADDRESS = re.compile(
    r"hf:/+datasets/(?P<path>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<name>[^/]+))?/?"
)

# --------------------------------------------------------------------------------------------------------------------
# One image.


def read_image(file: str | Path | BinaryIO | Image.Image, name: str = "", max_pixels: float = math.inf) -> Image.Image:
    """The image in ``file``, or an open one, as RGB, upright (EXIF), whatever its mode.

    Grey, palette, CMYK and 16-bit images are converted; transparency is dropped.

    Args:
        name: of the image in messages; by default its path.
        max_pixels: larger ones are not decoded.

    Raises:
        UserError: it cannot be read, is too large, or its values have no known range (floating point).
    """
    try:
        with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {max_pixels}")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):  # Pillow would clip them at 255
                values = np.asarray(upright)
                if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
                    raise ValueError(f"values of mode {upright.mode} outside 16 bits")
                upright = Image.fromarray(np.round(values / 257).astype(np.uint8))
            return upright.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"no image at {name or file}; check the path") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        # Pillow names an object in memory by its address, which differs each time.
        why = "it is none" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(f"cannot read image {name or file} ({why}); replace or remove it") from error


# --------------------------------------------------------------------------------------------------------------------
# Folders.


def existing_folder(root: str | Path, what: str) -> Path:
    """``root`` as a path; UserError if it is not a folder."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no {what} at {root}: it is not a folder; check the path")
    return root


class Folder:
    """Images ``root/<class>/<image>`` with labels that number the sorted folders, or ``root/<image>`` of one class.

    Attributes:
        classes: names of the class folders, sorted; :data:`UNLABELED` without them.
        samples: path and label of each image.

    Raises:
        UserError: there is no such folder, it holds no images, a class folder holds none, or images lie beside folders
            of images, so that it is not clear whether these are classes.
    """

    def __init__(self, root: str | Path):
        self.root = existing_folder(root, "image folder")
        with os.scandir(self.root) as entries:
            files = [entry.name for entry in entries if entry.is_file()]
        beside = [name for name in files if name.lower().endswith(IMG_EXTENSIONS)]
        try:
            self.classes, labels = ([UNLABELED], {"": 0}) if beside else find_classes(self.root)
            self.samples = make_dataset(str(self.root), labels, IMG_EXTENSIONS)
        except FileNotFoundError as error:
            what, kinds = reason(error).split(". ")[0].rstrip("."), " ".join(IMG_EXTENSIONS)
            text = f"{root} is not a folder of class folders with images: {what}; images are files of {kinds}"
            raise UserError(text) from error
        if len(self.samples) > len(beside) > 0:
            raise UserError(
                f"{root} holds images beside folders of images ({min(beside)} and others): move them into a folder, "
                "or all images into one"
            )

    def read(self, index: int) -> Image.Image:
        """Image ``index``; UserError if it cannot be read."""
        return read_image(self.samples[index][0])

    def name(self, index: int) -> str:
        """``class/file`` of image ``index``."""
        path = Path(self.samples[index][0]).relative_to(self.root)
        return str(UNLABELED / path if self.classes == [UNLABELED] and len(path.parts) == 1 else path)


# --------------------------------------------------------------------------------------------------------------------
# Rows.


def holds_rows(path: str | Path) -> bool:
    """Whether ``path`` is an address on the Hub, a parquet file, or a folder of such files."""
    if str(path).startswith("hf:/") or Path(path).suffix == ".parquet":
        return True
    # Beside train/ a parquet file may be anything.
    patterns = ("train/*.parquet",) if (Path(path) / "train").is_dir() else ("*.parquet", "data/*.parquet")
    return any(True for pattern in patterns for _ in Path(path).glob(pattern))


class Rows:
    """A split of a data set in rows: a parquet file, a folder of such files, or ``hf://datasets/owner/name``.

    ``datasets`` converts it once, into its cache, from where it is mapped into memory.

    Args:
        image_column, label_column: names; by default what the columns hold, and then their names, tell.

    Attributes:
        classes: names of the labels; with their numbers before them unless they sort as folders in that order.
            :data:`UNLABELED` without labels.
        samples: ``class/split-number``, with the number of the row, and label of each image.

    Raises:
        UserError: ``datasets`` is not installed or cannot open it, there is no such split or column, or a label is not
            the number of a class.
    """

    def __init__(self, root: str | Path, split: str, image_column: str | None = None, label_column: str | None = None):
        self.root = str(root)
        table, split = open_table(self.root, split)
        self.column = find_column(self.root, table, "image", image_column)
        if self.column is None:
            raise UserError(f"{root} has no column of images: its columns are {described(table)}")
        column = find_column(self.root, table, "label", label_column)
        log.info(
            "%s: %d rows of %s, images in %s, labels in %s", root, len(table), split, self.column, column or "none"
        )
        self.classes, labels = ([UNLABELED], [0] * len(table)) if column is None else self._labels(table, column)
        self.samples = [(f"{self.classes[label]}/{split}-{row:08d}", label) for row, label in enumerate(labels)]
        self.table = table.select_columns([self.column])

    def _labels(self, table, column: str) -> tuple[list[str], list[int]]:
        """The names of the classes, and the label of each row."""
        labels = table.data.column(column).to_pylist()
        names = getattr(table.features[column], "names", None)
        limit = len(labels) if names is None else len(names)  # no class is without images
        for row, label in enumerate(labels):
            if label is None or not 0 <= label < limit:
                what = f"row {row} of {self.root} has {label} in column {column}"
                raise UserError(f"{what}, which is no class's number; name another with --label_column")
        count = limit if names is not None else max(labels) + 1
        digits = len(str(count - 1))
        if names is None:
            return [f"{label:0{digits}d}" for label in range(count)], labels
        if names == sorted(names) and all(re.fullmatch(r"[^./][^/]*", name) for name in names):
            return names, labels
        return [f"{label:0{digits}d} {name.replace('/', '_')}" for label, name in enumerate(names)], labels

    def read(self, index: int) -> Image.Image:
        """Image ``index``; UserError if it cannot be read."""
        cell = self.table[index][self.column]
        if isinstance(cell, dict):  # a data set of files has no bytes
            cell = cell["bytes"] or cell.get("path")
        file = cell if isinstance(cell, str) else io.BytesIO(cell or b"")
        return read_image(file, f"{self.name(index)} of {self.root}")

    def name(self, index: int) -> str:
        """``class/split-number`` of image ``index``."""
        return self.samples[index][0]


def open_table(root: str, split: str) -> tuple[Any, str]:
    """The rows of ``train`` or ``val`` as a ``datasets.Dataset`` that does not decode images, and the split's own name.

    Raises:
        UserError: see :class:`Rows`.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(f"{root} needs a package that is not installed: pip install datasets") from error
    if not is_main_process():
        datasets.disable_progress_bars()
    if address := ADDRESS.fullmatch(root):
        place = address.groupdict()
    elif root.startswith("hf:/"):
        raise UserError(f"{root} is no data set on the Hub: write hf://datasets/owner/name[@revision][/configuration]")
    elif Path(root).is_dir():
        place = {"path": os.path.abspath(root)}
    else:
        place = {"path": "parquet", "data_files": os.path.abspath(root)}
    try:
        builder = datasets.load_dataset_builder(**place)
        builder.download_and_prepare()
        splits = list(builder.info.splits)
        if not (found := [name for name in SPLITS[split] if name in splits]):
            raise UserError(f"{root} has no split {' or '.join(SPLITS[split])}: it has {', '.join(splits)}")
        table = builder.as_dataset(found[0])
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        return table, found[0]
    except UserError:
        raise
    except Exception as error:  # files, formats and the network fail in many ways
        generic = isinstance(error, datasets.exceptions.DatasetGenerationError)  # its cause tells what happened
        cause = (error.__cause__ if generic else None) or error
        why = textwrap.shorten(str(cause) or type(cause).__name__, 300)  # some messages are tables
        files = "the network, and the account (hf auth login)" if address else "path and files"
        disk = f"the disk of {datasets.config.HF_DATASETS_CACHE}"
        raise UserError(f"cannot open {root} ({why}); check {files}, or {disk}, and start again") from error


def holds(feature: Any) -> str:
    """What a column holds: ``images``, ``bytes``, ``classes``, ``integers``, or the name of its type."""
    dtype = str(getattr(feature, "dtype", type(feature).__name__))
    if hasattr(feature, "names"):
        return "classes"
    if dtype == "PIL.Image.Image":
        return "images"
    if dtype.endswith("binary") or (isinstance(feature, dict) and "bytes" in feature):
        return "bytes"
    return "integers" if re.fullmatch(r"u?int\d+", dtype) else dtype


def described(table) -> str:
    """Names of a table's columns, and what each holds."""
    return ", ".join(f"{name} ({holds(feature)})" for name, feature in table.features.items())


def find_column(root: str, table, what: str, named: str | None) -> str | None:
    """The column of ``image`` or ``label``: the one ``named``, else the likeliest, or None.

    Raises:
        UserError: the one named is not there, or holds something else.
    """
    kinds, usual = COLUMNS[what]
    there = {name: holds(feature) for name, feature in table.features.items()}
    if named is not None:
        if there.get(named) not in kinds:
            raise UserError(f"--{what}_column {named}: {root} has no such column of {what}s, but {described(table)}")
        return named
    found = [name for name, kind in there.items() if kind in kinds and (kind != "integers" or name in usual)]
    return min(found, key=lambda name: (kinds.index(there[name]), name not in usual), default=None)


# --------------------------------------------------------------------------------------------------------------------
# Which of both a path is.


def images_root(path: str | Path, split: str) -> Path | str:
    """Where the images of ``train`` or ``val`` lie: a data set of rows, or a folder.

    That is ``path/train`` or ``path/val``, or ``path`` itself, all of it for training, if it holds neither.

    Raises:
        UserError: there is no such folder.
    """
    if holds_rows(path):
        return str(path)
    root = existing_folder(path, "image folder")
    divided = any((root / name).is_dir() for name in SPLITS)
    return existing_folder(root / split, "image folder") if divided or split != "train" else root


def open_images(
    path: str | Path, split: str, image_column: str | None = None, label_column: str | None = None
) -> Folder | Rows:
    """The images of ``train`` or ``val`` in ``path``; UserError if there are none."""
    root = images_root(path, split)
    return Folder(root) if isinstance(root, Path) else Rows(root, split, image_column, label_column)
