"""Where images come from: folders of files, or rows of a data set that Hugging Face's ``datasets`` opens."""

import io
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from util import distributed
from util.errors import UserError, reason
from util.log import log, warn

#: The one class of images that have none: a folder of caches, and the label 0.
UNLABELED = "images"
#: Endings of image files, for every command: torchvision's, and of other formats that Pillow always reads.
ENDINGS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jpe", ".jfif", ".mpo", ".gif", ".apng", ".pbm", ".pnm", ".dib"),
)
if find_spec("PIL._avif"):  # only newer versions of Pillow
    ENDINGS += (".avif",)
HEIC_ENDINGS = (".heic", ".heif", ".hif")
HEIC = "HEIC, which Pillow does not read: convert it to JPEG, for example with pillow-heif (docs/own_data.md)"
#: Folders and files of operating systems and servers, beside those whose names start with a dot.
SYSTEM = {
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "Thumbs.db",
    "desktop.ini",
}
#: What splits are called: in flags, and in folders and data sets, in lower case. Names of one group mean the same, and
#: the first group that is there counts.
SPLITS = {
    "train": (("train", "training"),),
    "val": (("validation", "val", "valid"), ("test", "testing")),
}
#: Folders that are probably splits, although their names are not among :data:`SPLITS`: ``train2017``, ``test_set``.
SPLIT_LIKE = {
    "train": re.compile(r"train(ing)?([^a-z].*|set)", re.IGNORECASE),
    "val": re.compile(r"(val(id(ation)?)?|test(ing)?)([^a-z].*|set)", re.IGNORECASE),
}
#: What columns of images and labels hold, and what they are called, in lower case, the likeliest first.
COLUMNS = {
    "image": (("images", "bytes"), (("image", "img"),)),
    "label": (
        ("classes", "integers", "strings", "booleans"),
        (
            ("label", "labels", "class", "class_id", "target"),
            ("cls", "category", "category_id", "class_label", "class_name", "label_name", "y"),
            ("fine_label", "coarse_label"),
        ),
    ),
}
#: Names of other columns that probably hold labels.
LABEL_LIKE = re.compile(r"label|class|cls|categor|target|species|breed|^y$", re.IGNORECASE)
#: ``--label_column`` for images of one class, whatever other columns hold.
NO_LABELS = "none"
#: ``hf://datasets/owner/name[@revision][/configuration]``; of the two slashes pathlib leaves one.
ADDRESS = re.compile(
    r"hf:/+datasets/(?P<path>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<name>[^/]+))?/?"
)

# --------------------------------------------------------------------------------------------------------------------
# One image.


#: How to undo EXIF's orientations.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    file: str | Path | BinaryIO | Image.Image, name: str = "", max_pixels: float = math.inf
) -> Image.Image:
    """Return the image in ``file``, or an open one, as RGB: upright, and over white where it is transparent.

    See :func:`read_upright` for arguments, modes and errors.
    """
    return over_white(read_upright(file, name, max_pixels))


def read_upright(
    file: str | Path | BinaryIO | Image.Image, name: str = "", max_pixels: float = math.inf
) -> Image.Image:
    """Return the image in ``file``, or an open one, upright (EXIF), as RGB, or as RGBA if it can be transparent.

    Images of any mode are converted: gray, palette, CMYK, 16 bits. Of several frames it is the first.

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
            image.load()
            turn = UPRIGHT.get(orientation(image))
            upright = image if turn is None else image.transpose(turn)
            if upright.mode.startswith(("I", "F")):  # Pillow would clip them at 255
                upright = in_bytes(upright, image.format)
            if upright.mode == "La":  # Pillow converts it to nothing else
                upright = upright.convert("LA")
            transparent = (
                upright.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in upright.info
            )
            if upright.mode == "P":
                transparent |= upright.palette.mode.endswith("A")
            return upright.convert("RGBA" if transparent else "RGB")
    except FileNotFoundError as error:
        raise UserError(f"no image at {in_one_line(name or file)}; check the path") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        why = why_no_image(file) if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(
            f"cannot read image {in_one_line(name or file)} ({why}); replace or remove it"
        ) from error


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 if there is none."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data do not damage pixels
        return 1


def in_bytes(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert an image of one channel of more than 8 bits to 8 bits.

    Pillow has one mode for integers of 32 bits, whose range a TIFF does not state: values up to 255 are taken for
    bytes, larger ones for 16 bits. The same mode stands for 16 bits in PNGs (older versions of Pillow) and PGMs.

    Raises:
        ValueError: values are of floating point, negative, or beyond 16 bits.
    """
    values = np.asarray(image)
    if values.dtype.kind == "f":
        raise ValueError(
            f"values of mode {image.mode}, floating point, have no known range: save them with 8 bits"
        )
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"values of mode {image.mode} outside 16 bits")
    wide = image.mode.startswith("I;16") or file_format in ("PNG", "PPM") or values.max() > 255
    gray = Image.fromarray(np.round(values / (257 if wide else 1)).astype(np.uint8))
    if "transparency" in image.info:
        gray.putalpha(
            Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255)
        )
    return gray


def over_white(image: Image.Image) -> Image.Image:
    """Return an RGB image as it is, and an RGBA image over white, as RGB."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def why_no_image(file: Any) -> str:
    """Describe the content of a file, given by its path or open, that Pillow does not take for an image."""
    with nullcontext(file) if hasattr(file, "read") else open(file, "rb") as content:
        content.seek(0)
        head = content.read(12)
    if not head:
        return "it is empty"
    heic = head[4:8] == b"ftyp" and head[8:12] in (
        b"heic",
        b"heix",
        b"heim",
        b"heis",
        b"hevc",
        b"mif1",
        b"msf1",
    )
    return f"it is {HEIC}" if heic else "it is none"


def in_one_line(name: Any) -> str:
    """Return a file's name on one line."""
    return str(name).replace("\n", "\\n")


# --------------------------------------------------------------------------------------------------------------------
# Folders.


def existing_folder(root: str | Path, what: str) -> Path:
    """``root`` as a path; UserError if it is not a folder."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no {what} at {root}: it is not a folder; check the path")
    return root


def find_files(
    root: str | Path, endings: tuple[str, ...] = ENDINGS
) -> tuple[dict[str, list[str]], Counter[str]]:
    """Find files by their endings in a folder and its subfolders, those behind links included.

    Hidden and system files and folders are left out, and links that lead to a folder above. No file is opened or asked
    for its size or type, so that a million takes seconds.

    Returns:
        the sorted names in each folder, by the folder's path, ``root`` first; folders without such files have none.
        The number of files that were skipped, by ending.

    Raises:
        UserError: a folder cannot be read.
    """
    found: dict[str, list[str]] = {}
    skipped: Counter[str] = Counter()
    read_as: dict[str, str] = {}
    twice: list[str] = []

    def walk(folder: str, above: frozenset[str]) -> None:
        real = os.path.realpath(folder)
        if real in above:
            skipped["links to a folder above"] += 1
            return
        if real in read_as:
            twice.append(folder)
        read_as.setdefault(real, folder)
        names, folders = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    skipped["hidden or system"] += 1
                elif entry.is_dir():
                    folders.append(entry.path)
                elif entry.name.lower().endswith(endings):
                    names.append(entry.name)
                else:
                    skipped[os.path.splitext(entry.name)[1].lower() or "without ending"] += 1
        found[folder] = sorted(names)
        for each in sorted(folders):
            walk(each, above.union((real, *map(str, Path(real).parents))))

    try:
        walk(str(root), frozenset(map(str, Path(root).resolve().parents)))
    except OSError as error:
        raise UserError(
            f"cannot read folder {in_one_line(error.filename)}: {error.strerror}"
        ) from error
    if twice:
        same = read_as[os.path.realpath(twice[0])]
        warn(
            "%d folders are read twice, by links: %s is %s",
            len(twice),
            in_one_line(twice[0]),
            in_one_line(same),
        )
    return found, skipped


def is_hidden(name: str) -> bool:
    """Return whether a file or folder belongs to an operating system or another program."""
    return name.startswith(".") or name in SYSTEM


def paths_in(folder: str, names: Iterable[str]) -> list[str]:
    """Return the paths of files in ``folder``."""
    start = os.path.join(folder, "")
    return [start + name for name in names]


def find_class_folders(
    root: str | Path, endings: tuple[str, ...] = ENDINGS
) -> tuple[dict[str, list[str]], list[str], Counter[str]]:
    """Find the files of each class folder in ``root``, in torchvision's order.

    Returns:
        the files by the class folder's name, sorted by class, then by folder, then by name, empty for folders without
        any; the files in ``root`` itself; and what was skipped (see :func:`find_files`).
    """
    found, skipped = find_files(root, endings)
    beside = paths_in(str(root), found.pop(str(root)))
    start = len(os.path.join(root, ""))
    classes: dict[str, list[str]] = {}
    for name, folder in sorted((folder[start:].split(os.sep, 1)[0], folder) for folder in found):
        classes.setdefault(name, []).extend(paths_in(folder, found[folder]))
    return classes, beside, skipped


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Describe the files that are no images, by their endings, the most frequent first."""
    counts = sorted(skipped.items(), key=lambda item: -item[1])
    text = ", ".join(f"{count} {in_one_line(ending)}" for ending, count in counts)
    heic = any(ending in skipped for ending in HEIC_ENDINGS)
    return f"{text} ({HEIC_ENDINGS[0]} is {HEIC})" if heic else text


def report_found(
    root: str | Path, count: int, classes: list[str], skipped: Mapping[str, int]
) -> None:
    """Log what a folder or data set holds; rank 0 does."""
    what = f"{count} images"
    if classes != [UNLABELED]:
        ends = dict.fromkeys((classes[0], classes[-1]))
        what += f" of {len(classes)} class{'es' * (len(classes) > 1)}, {' to '.join(map(in_one_line, ends))}"
    left_out = f"; skipped: {describe_skipped(skipped)}" if skipped else ""
    log.info("%s: %s%s", in_one_line(root), what, left_out)


def no_images(what: str, skipped: Mapping[str, int]) -> UserError:
    """Return the error that ``what``, with the endings of images and what was found instead."""
    seen = f"; skipped: {describe_skipped(skipped)}" if skipped else ""
    return UserError(f"{what}; images are files of {' '.join(ENDINGS)}{seen}")


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
        found, beside, skipped = find_class_folders(self.root)
        if beside and any(found.values()):
            stray = in_one_line(os.path.basename(beside[0]))
            raise UserError(
                f"{root} holds images beside folders of images ({stray} and others): move them into a folder, or all "
                "images into one"
            )
        found = {UNLABELED: beside} if beside else found
        empty = [in_one_line(name) for name, paths in found.items() if not paths]
        if empty or not found:
            what = f"none are in {', '.join(empty[:4])}" if empty else "it holds none"
            raise no_images(f"{root} is not a folder of class folders with images: {what}", skipped)
        self.classes = list(found)
        self.samples = [(path, label) for label, name in enumerate(found) for path in found[name]]
        report_found(root, len(self.samples), self.classes, skipped)

    def read(self, index: int) -> Image.Image:
        """Image ``index``; UserError if it cannot be read."""
        return read_image(self.samples[index][0])

    def name(self, index: int) -> str:
        """``class/file`` of image ``index``."""
        path = Path(self.samples[index][0]).relative_to(self.root)
        return str(
            UNLABELED / path if self.classes == [UNLABELED] and len(path.parts) == 1 else path
        )


class AllImages(Folder):
    """All images of a folder and its subfolders, sorted by path, of one class.

    Raises:
        UserError: there is no such folder, or it holds no images.
    """

    def __init__(self, root: str | Path):
        self.root = existing_folder(root, "image folder")
        found, skipped = find_files(self.root)
        paths = [path for folder, names in found.items() for path in paths_in(folder, names)]
        if not paths:
            raise no_images(f"{root} holds no images", skipped)
        self.classes = [UNLABELED]
        self.samples = [(path, 0) for path in sorted(paths, key=lambda path: path.split(os.sep))]
        report_found(root, len(paths), self.classes, skipped)


# --------------------------------------------------------------------------------------------------------------------
# Rows.


def holds_rows(path: str | Path) -> bool:
    """Whether ``path`` is an address on the Hub, a parquet file, or a folder of such files."""
    if str(path).startswith("hf:/") or Path(path).suffix == ".parquet":
        return True
    # Beside train/ a parquet file may be anything.
    patterns = (
        ("train/*.parquet",) if (Path(path) / "train").is_dir() else ("*.parquet", "data/*.parquet")
    )
    return any(True for pattern in patterns for _ in Path(path).glob(pattern))


class Rows:
    """A split of a data set in rows: a parquet file, a folder of such files, or ``hf://datasets/owner/name``.

    ``datasets`` converts it once, into its cache, from where it is mapped into memory.

    Args:
        image_column, label_column: names; by default what the columns hold, and then their names, tell.
            :data:`NO_LABELS` for images of one class.

    Attributes:
        classes: names of the labels; with their numbers before them unless they sort as folders in that order.
            :data:`UNLABELED` without labels. Labels that are strings or booleans number the sorted values.
        samples: ``class/split-number``, with the number of the row, and label of each image.

    Raises:
        UserError: ``datasets`` is not installed or cannot open it, there is no such split or column, a label is not
            the number of a class, or it is not clear which column holds labels.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        self.root = str(root)
        table, split = open_table(self.root, split)
        self.column = find_column(self.root, table, "image", image_column)
        if self.column is None:
            raise UserError(f"{root} has no column of images: its columns are {described(table)}")
        column = find_labels(self.root, table, self.column, label_column)
        self.classes, labels = (
            ([UNLABELED], [0] * len(table)) if column is None else self._labels(table, column)
        )
        self.samples = [
            (f"{self.classes[label]}/{split}-{row:08d}", label) for row, label in enumerate(labels)
        ]
        what = f"{root}, split {split}, images in {self.column}, labels in {column or 'none'}"
        report_found(what, len(table), self.classes, {})
        self.table = table.select_columns([self.column])

    def _labels(self, table, column: str) -> tuple[list[str], list[int]]:
        """The names of the classes, and the label of each row."""
        labels: list[Any] = table.data.column(column).to_pylist()
        names = getattr(table.features[column], "names", None)
        if holds(table.features[column]) in ("strings", "booleans"):
            names = sorted({str(label) for label in labels if label is not None})
            numbers = {name: number for number, name in enumerate(names)}
            labels = [None if label is None else numbers[str(label)] for label in labels]
        limit = len(labels) if names is None else len(names)  # no class is without images
        for row, label in enumerate(labels):
            if label is None or not 0 <= label < limit:
                what = f"row {row} of {self.root} has {label} in column {column}"
                raise UserError(
                    f"{what}, which is no class's number; name another with --label_column"
                )
        count = limit if names is not None else max(labels) + 1
        digits = len(str(count - 1))
        if names is None:
            return [f"{label:0{digits}d}" for label in range(count)], labels
        if names == sorted(names) and all(re.fullmatch(r"[^./][^/]*", name) for name in names):
            return names, labels
        return [
            f"{label:0{digits}d} {name.replace('/', '_')}" for label, name in enumerate(names)
        ], labels

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
        raise UserError(
            f"{root} needs a package that is not installed: pip install datasets"
        ) from error
    if not distributed.is_main_process():
        datasets.disable_progress_bars()
    if address := ADDRESS.fullmatch(root):
        place = address.groupdict()
    elif root.startswith("hf:/"):
        raise UserError(
            f"{root} is no data set on the Hub: write hf://datasets/owner/name[@revision][/configuration]"
        )
    elif Path(root).is_dir():
        place = {"path": os.path.abspath(root)}
    else:
        place = {"path": "parquet", "data_files": os.path.abspath(root)}
    try:
        builder = datasets.load_dataset_builder(**place)
        builder.download_and_prepare()
        splits = list(builder.info.splits)
        if (found := find_split(root, splits, split)) is None:
            known = " or ".join(chain(*SPLITS[split]))
            raise NoSplit(f"{root} has no split {known}: it has {', '.join(splits)}")
        table = builder.as_dataset(found)
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        return table, found
    except UserError:
        raise
    except Exception as error:  # files, formats and the network fail in many ways
        generic = isinstance(
            error, datasets.exceptions.DatasetGenerationError
        )  # its cause tells what happened
        cause = (error.__cause__ if generic else None) or error
        why = textwrap.shorten(str(cause) or type(cause).__name__, 300)  # some messages are tables
        files = "the network, and the account (hf auth login)" if address else "path and files"
        disk = f"the disk of {datasets.config.HF_DATASETS_CACHE}"
        raise UserError(
            f"cannot open {root} ({why}); check {files}, or {disk}, and start again"
        ) from error


def holds(feature: Any) -> str:
    """What a column holds: ``images``, ``bytes``, ``classes``, ``integers``, ... or the name of its type."""
    dtype = str(getattr(feature, "dtype", type(feature).__name__))
    if hasattr(feature, "names"):
        return "classes"
    if dtype == "PIL.Image.Image":
        return "images"
    if dtype.endswith("binary") or (isinstance(feature, dict) and "bytes" in feature):
        return "bytes"
    kinds = {r"u?int\d+": "integers", r"(large_)?string(_view)?": "strings", "bool": "booleans"}
    kinds[r"(half)?float\d*|double"] = "floating-point numbers"
    return next((kind for pattern, kind in kinds.items() if re.fullmatch(pattern, dtype)), dtype)


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
            raise UserError(
                f"--{what}_column {named}: {root} has no such column of {what}s, but {described(table)}"
            )
        return named

    def rank(name: str) -> int:
        return next((i for i, names in enumerate(usual) if name.lower() in names), len(usual))

    # Types that hold images or classes and nothing else count under any name.
    sure = ("images", "bytes", "classes")
    found = [
        name
        for name, kind in there.items()
        if kind in kinds and (kind in sure or rank(name) < len(usual))
    ]
    return min(found, key=lambda name: (kinds.index(there[name]), rank(name)), default=None)


def find_labels(root: str, table, image_column: str, named: str | None) -> str | None:
    """The column of labels: the one ``named``, else the likeliest; None for images of one class.

    Raises:
        UserError: the one named is not there, or holds something else; or there is none that is surely one of labels,
            but one that may be.
    """
    if named == NO_LABELS and NO_LABELS not in table.features:
        return None
    column = find_column(root, table, "label", named)
    if column is not None:
        return column
    for name, feature in table.features.items():
        kind = holds(feature)
        few = (
            kind in ("strings", "booleans")
            and len(table.data.column(name).unique()) <= len(table) // 2
        )
        if (
            name != image_column
            and kind not in COLUMNS["image"][0]
            and (few or LABEL_LIKE.search(name))
        ):
            usable = kind in COLUMNS["label"][0]
            how = f"pass --label_column {name}" if usable else "make them integers or strings"
            raise UserError(
                f"{root} may have labels in column {name} ({kind}): {how}, or pass --label_column {NO_LABELS} for "
                "images of one class"
            )
    return None


# --------------------------------------------------------------------------------------------------------------------
# Which of both a path is.


class NoSplit(UserError):
    """There is no such split: other errors tell that there is one, or might be."""


def find_split(root: str | Path, names: Iterable[str], split: str) -> str | None:
    """Return which of ``names``, of folders or of a data set's splits, is ``train`` or ``val``; None if none is.

    Raises:
        UserError: two of them are.
    """
    for group in SPLITS[split]:
        found = sorted(name for name in names if name.lower() in group)
        if len(found) > 1:
            both = " and ".join(found)
            raise UserError(
                f"{root} has {both}, either of which may be the split {split}: rename or move one of them"
            )
        if found:
            return found[0]
    return None


def find_split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of ``train`` and ``val`` in ``root``, as far as they are there; none in a folder of classes.

    Raises:
        UserError: it is not clear whether folders are splits or classes, or which is a split.
    """
    with os.scandir(root) as entries:
        names = sorted(
            entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir()
        )
    found = {split: name for split in SPLITS if (name := find_split(root, names, split))}
    alike = {
        split: [name for name in names if pattern.fullmatch(name)]
        for split, pattern in SPLIT_LIKE.items()
    }
    one_class = "if they are classes, put all class folders into a folder train/"
    if not found and all(alike.values()):
        both = " and ".join(each[0] for each in alike.values())
        raise UserError(
            f"{root} has {both}: if these are splits, rename them to train and val; {one_class}"
        )
    if len(found) == 1:  # else both splits, which no two classes are called
        (split,) = found.values()
        others = [
            name for name in names if name != split and name.lower() not in chain(*SPLITS["val"])
        ]
        others = [in_one_line(name) for name in others if any(find_files(root / name)[0].values())]
        if others:
            raise UserError(
                f"{root} has {split} beside {', '.join(others[:4])}, which hold images, too: if {split} is a split, "
                f"move the others out of {root}, or into {root / 'train'}; {one_class}"
            )
    return {split: root / name for split, name in found.items()}


def images_root(path: str | Path, split: str) -> Path | str:
    """Where the images of ``train`` or ``val`` lie: a data set of rows, or a folder.

    That is a folder of :data:`SPLITS` in ``path``, in any capitalization, or ``path`` itself, all of it for training,
    if it holds none of them.

    Raises:
        UserError: there is no such folder, or it is not clear which folder it is; :class:`NoSplit` if there are others.
    """
    if holds_rows(path):
        return str(path)
    root = existing_folder(path, "image folder")
    folders = find_split_folders(root)
    if split in folders or (split == "train" and not folders):
        return folders.get(split, root)
    known = ", ".join(f"{name}/" for name in chain(*SPLITS[split]))
    what = f"no image folder at {root / split}: {root} has none of {known}"
    if split == "train":
        there = folders["val"]
        what += f", but held-out images in {there}: put those to train on into {root / split}, or name {there} itself"
    raise NoSplit(what)


def open_images(
    path: str | Path, split: str, image_column: str | None = None, label_column: str | None = None
) -> Folder | Rows:
    """The images of ``train`` or ``val`` in ``path``; UserError if there are none."""
    root = images_root(path, split)
    if split == "val" and isinstance(root, Path):
        train = find_split_folders(Path(path)).get("train")
        if train is not None and train.resolve() == root.resolve():
            warn(
                "%s is the folder of the training images: measures of it are not held-out ones",
                root,
            )
    return Folder(root) if isinstance(root, Path) else Rows(root, split, image_column, label_column)


def open_unlabeled(path: str | Path) -> AllImages | Rows:
    """The training images in ``path``, whatever their classes; UserError if there are none."""
    root = images_root(path, "train")
    return (
        AllImages(root) if isinstance(root, Path) else Rows(root, "train", label_column=NO_LABELS)
    )
