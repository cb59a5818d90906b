"""Sources of images: folders of files, or rows of a data set that ``datasets`` opens.

``datasets`` is Hugging Face's package; only rows need it.
"""

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

#: Class name of images without labels, with label 0. It is also the name of their folder in caches.
UNLABELED = "images"
#: Endings of image files: those of torchvision, and of other formats that Pillow always reads
ENDINGS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jpe", ".jfif", ".mpo", ".gif", ".apng", ".pbm", ".pnm", ".dib"),
)
if find_spec("PIL._avif"):  # only newer versions of Pillow
    ENDINGS += (".avif",)
HEIC_ENDINGS = (".heic", ".heif", ".hif")
HEIC = (
    "HEIC, which Pillow does not read: convert it to JPEG, for example with pillow-heif "
    "(docs/own_data.md)"
)
#: Folders and files of operating systems and servers, besides those whose names start with a dot
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
#: Names of each split in folders and data sets, in lower case. Names of one group are synonyms. The
#: first group that exists is used.
SPLITS = {
    "train": (("train", "training"),),
    "val": (("validation", "val", "valid"), ("test", "testing")),
}
#: Names that are not in :data:`SPLITS`, but probably denote a split: ``train2017``, ``test_set``
SPLIT_LIKE = {
    "train": re.compile(r"train(ing)?([^a-z].*|set)", re.IGNORECASE),
    "val": re.compile(r"(val(id(ation)?)?|test(ing)?)([^a-z].*|set)", re.IGNORECASE),
}
#: Kinds (:func:`column_kind`) and names of the columns of images and labels, most likely first. The
#: names are in lower case.
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
#: Names of other columns that probably hold labels
LABEL_LIKE = re.compile(r"label|class|cls|categor|target|species|breed|^y$", re.IGNORECASE)
#: ``--label_column`` for images without labels, whatever the other columns hold
NO_LABELS = "none"
#: ``hf://datasets/owner/name[@revision][/configuration]``. pathlib removes one of the two slashes.
ADDRESS = re.compile(
    r"hf:/+datasets/(?P<path>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(?:/(?P<name>[^/]+))?/?"
)

# --------------------------------------------------------------------------------------------------
# One image

#: The operation that undoes each orientation of EXIF
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
    """Return an image as RGB: upright, and with white behind transparent pixels.

    See :func:`read_upright` for arguments, modes and errors.
    """
    return over_white(read_upright(file, name, max_pixels))


def read_upright(
    file: str | Path | BinaryIO | Image.Image, name: str = "", max_pixels: float = math.inf
) -> Image.Image:
    """Return an image upright (by EXIF), as RGB, or as RGBA if it can have transparent pixels.

    Images of all modes are converted: gray, palette, CMYK, 16 bits. If there are several frames, it
    is the first one.

    Args:
        file: a path, an open file or an opened image.
        name: the name of the image in messages; by default its path.
        max_pixels: larger images are not decoded.

    Raises:
        UserError: the image cannot be read, is too large, or has floating-point values, whose range
            is unknown.
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
            if upright.mode == "La":  # Pillow converts La to LA alone
                upright = upright.convert("LA")
            transparent = upright.mode in ("LA", "PA", "RGBA", "RGBa")
            transparent |= "transparency" in upright.info
            if upright.mode == "P":
                transparent |= upright.palette.mode.endswith("A")
            return upright.convert("RGBA" if transparent else "RGB")
    except FileNotFoundError as error:
        raise UserError(f"no image at {in_one_line(name or file)}; check the path") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        unidentified = isinstance(error, UnidentifiedImageError)
        cause = why_no_image(file) if unidentified else reason(error)
        raise UserError(
            f"cannot read image {in_one_line(name or file)} ({cause}); replace or remove it"
        ) from error


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation (1 to 8); 1 if there is none."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # the pixels can be read even if the EXIF data are damaged
        return 1


def in_bytes(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert an image with one channel of more than 8 bits to 8 bits.

    16-bit modes have a range of 16 bits, and so have 32-bit integers of PNGs (older versions of
    Pillow) and PGMs. Other files with 32-bit integers (TIFF) do not state the range: it is 8 bits
    if all values are at most 255, otherwise 16 bits.

    Args:
        image: an image of one of Pillow's modes I and F.
        file_format: Pillow's name of the file format.

    Raises:
        ValueError: values are floating-point, negative, or need more than 16 bits.
    """
    values = np.asarray(image)
    if values.dtype.kind == "f":
        raise ValueError(
            f"values of mode {image.mode}, floating point, have no known range: save the image "
            "with 8 bits"
        )
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"values of mode {image.mode} outside 16 bits")
    wide = image.mode.startswith("I;16") or file_format in ("PNG", "PPM") or values.max() > 255
    gray = Image.fromarray(np.round(values / (257 if wide else 1)).astype(np.uint8))
    if "transparency" in image.info:
        opaque = values != image.info["transparency"]
        gray.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return gray


def over_white(image: Image.Image) -> Image.Image:
    """Return an RGB or RGBA image as RGB, with white behind transparent pixels."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def why_no_image(file: Any) -> str:
    """Say why Pillow cannot identify the image in ``file``, a path or an open file."""
    with nullcontext(file) if hasattr(file, "read") else open(file, "rb") as content:
        content.seek(0)
        head = content.read(12)
    if not head:
        return "it is empty"
    heic_brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
    if head[4:8] == b"ftyp" and head[8:12] in heic_brands:
        return f"it is {HEIC}"
    return "it is no image"


def in_one_line(name: Any) -> str:
    """Return a file name with its line breaks escaped."""
    return str(name).replace("\n", "\\n")


# --------------------------------------------------------------------------------------------------
# Folders


def existing_folder(root: str | Path, kind: str) -> Path:
    """Return ``root`` as a path.

    Args:
        root: a folder.
        kind: what the folder holds, for the message: ``"cache"``, ``"image folder"``.

    Raises:
        UserError: ``root`` is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no {kind} at {root}: it is not a folder; check the path")
    return root


def find_files(
    root: str | Path, endings: tuple[str, ...] = ENDINGS
) -> tuple[dict[str, list[str]], Counter[str]]:
    """Find files by their endings in a folder and its subfolders. Links are followed.

    Hidden and system files and folders are skipped, and also links to a parent folder. No file is
    opened, and its size is not read, so that a million files take seconds.

    Returns:
        the sorted names in each folder, by the folder's path, ``root`` first (also folders without
        such files); and the number of skipped files by ending.

    Raises:
        UserError: a folder cannot be read.
    """
    found: dict[str, list[str]] = {}
    skipped: Counter[str] = Counter()
    first_paths: dict[str, str] = {}  # of each real folder
    repeated: list[str] = []  # folders that a link names once more

    def walk(folder: str, parents: frozenset[str]) -> None:
        real = os.path.realpath(folder)
        if real in parents:
            skipped["links to a parent folder"] += 1
            return
        if real in first_paths:
            repeated.append(folder)
        first_paths.setdefault(real, folder)
        names = []
        subfolders = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    skipped["hidden or system"] += 1
                elif entry.is_dir():
                    subfolders.append(entry.path)
                elif entry.name.lower().endswith(endings):
                    names.append(entry.name)
                else:
                    ending = os.path.splitext(entry.name)[1].lower()
                    skipped[ending or "without ending"] += 1
        found[folder] = sorted(names)
        for subfolder in sorted(subfolders):
            walk(subfolder, parents.union((real, *map(str, Path(real).parents))))

    try:
        walk(str(root), frozenset(map(str, Path(root).resolve().parents)))
    except OSError as error:
        raise UserError(
            f"cannot read folder {in_one_line(error.filename)}: {error.strerror}"
        ) from error
    if repeated:
        warn(
            "%d folders are read twice because of links: %s is %s",
            len(repeated),
            in_one_line(repeated[0]),
            in_one_line(first_paths[os.path.realpath(repeated[0])]),
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
        the paths of the files by class name, sorted by class, then by folder, then by name (an
        empty list for a class folder without such files); the paths of the files in ``root``
        itself; and the number of skipped files by ending.

    Raises:
        UserError: a folder cannot be read.
    """
    found, skipped = find_files(root, endings)
    in_root = paths_in(str(root), found.pop(str(root)))
    start = len(os.path.join(root, ""))
    classes: dict[str, list[str]] = {}
    for name, folder in sorted((folder[start:].split(os.sep, 1)[0], folder) for folder in found):
        classes.setdefault(name, []).extend(paths_in(folder, found[folder]))
    return classes, in_root, skipped


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Return text with the number of skipped files by ending, the most frequent first."""
    counts = sorted(skipped.items(), key=lambda item: -item[1])
    text = ", ".join(f"{count} {in_one_line(ending)}" for ending, count in counts)
    heic = any(ending in skipped for ending in HEIC_ENDINGS)
    return f"{text} ({HEIC_ENDINGS[0]} is {HEIC})" if heic else text


def report_found(
    root: str | Path, count: int, classes: list[str], skipped: Mapping[str, int]
) -> None:
    """Log the number of images and the classes of a folder or data set. Only rank 0 logs this."""
    content = f"{count} images"
    if classes != [UNLABELED]:
        plural = "es" if len(classes) > 1 else ""
        ends = dict.fromkeys((classes[0], classes[-1]))
        content += f" of {len(classes)} class{plural}, {' to '.join(map(in_one_line, ends))}"
    left_out = f"; skipped: {describe_skipped(skipped)}" if skipped else ""
    log.info("%s: %s%s", in_one_line(root), content, left_out)


def no_images(problem: str, skipped: Mapping[str, int]) -> UserError:
    """Return the error ``problem``, with the known endings and the files that were skipped."""
    other_files = f"; skipped: {describe_skipped(skipped)}" if skipped else ""
    return UserError(f"{problem}; images are files of {' '.join(ENDINGS)}{other_files}")


class Folder:
    """Images ``root/<class>/<image>``, or ``root/<image>`` of one class.

    Attributes:
        classes: names of the class folders, sorted. Their positions are the labels.
            :data:`UNLABELED` if there are no class folders.
        samples: path and label of each image.

    Raises:
        UserError: there is no such folder, it or one of its class folders holds no images, or it
            holds both images and folders of images, so that these may not be classes.
    """

    def __init__(self, root: str | Path):
        self.root = existing_folder(root, "image folder")
        class_paths, in_root, skipped = find_class_folders(self.root)
        if in_root and any(class_paths.values()):
            stray = in_one_line(os.path.basename(in_root[0]))
            raise UserError(
                f"{root} holds images beside folders of images ({stray} and others): move them "
                "into a folder, or all images into one"
            )
        if in_root:
            class_paths = {UNLABELED: in_root}
        empty = [in_one_line(name) for name, paths in class_paths.items() if not paths]
        if empty or not class_paths:
            problem = f"none are in {', '.join(empty[:4])}" if empty else "it holds none"
            raise no_images(
                f"{root} is not a folder of class folders with images: {problem}", skipped
            )
        self.classes = list(class_paths)
        self.samples = [
            (path, label) for label, name in enumerate(class_paths) for path in class_paths[name]
        ]
        report_found(root, len(self.samples), self.classes, skipped)

    def read(self, index: int) -> Image.Image:
        """Return image ``index`` as RGB; UserError if it cannot be read."""
        return read_image(self.samples[index][0])

    def content(self, index: int) -> bytes:
        """Return the bytes of the file of image ``index``; OSError if it cannot be read."""
        return Path(self.samples[index][0]).read_bytes()

    def name(self, index: int) -> str:
        """Return ``class/file`` of image ``index``."""
        path = Path(self.samples[index][0]).relative_to(self.root)
        unlabeled = self.classes == [UNLABELED] and len(path.parts) == 1
        return str(UNLABELED / path if unlabeled else path)


class AllImages(Folder):
    """All images of a folder and its subfolders as one class, sorted by path.

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


# --------------------------------------------------------------------------------------------------
# Rows


def holds_rows(path: str | Path) -> bool:
    """Return whether ``path`` is an address on the Hub, a parquet file, or a folder of them."""
    if str(path).startswith("hf:/") or Path(path).suffix == ".parquet":
        return True
    patterns = ["*.parquet", "data/*.parquet"]
    if (Path(path) / "train").is_dir():  # then other parquet files may be anything
        patterns = ["train/*.parquet"]
    return any(True for pattern in patterns for _ in Path(path).glob(pattern))


class Rows:
    """A split of a data set in rows: a parquet file, a folder of them, or a data set on the Hub.

    ``datasets`` converts it once, into its own cache, and maps the result into memory.

    Args:
        root: a file, a folder, or ``hf://datasets/owner/name``.
        split: ``"train"`` or ``"val"``.
        image_column, label_column: names of columns. By default they are chosen by the kinds, then
            by the names of the columns. :data:`NO_LABELS` makes all images one class.

    Attributes:
        classes: names of the labels, :data:`UNLABELED` without labels. Each name starts with its
            number unless the names sort as folders in the order of the labels. Labels that are
            strings or booleans are numbered in sorted order.
        samples: ``class/split-number``, where the number is that of the row, and label of each
            image.
        column: name of the column of images.
        table: the ``datasets.Dataset`` with this column.

    Raises:
        UserError: ``datasets`` is not installed or cannot open the data set; there is no such split
            or column; a label is not the number of a class; or it is not clear which column holds
            labels.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        self.root = str(root)
        table, split_name = open_table(self.root, split)
        found_column = find_column(self.root, table, "image", image_column)
        if found_column is None:
            raise UserError(
                f"{root} has no column of images: its columns are {describe_columns(table)}"
            )
        self.column = found_column
        column = find_label_column(self.root, table, self.column, label_column)
        self.classes = [UNLABELED]
        labels = [0] * len(table)
        if column is not None:
            self.classes, labels = self._labels(table, column)
        self.samples = [
            (f"{self.classes[label]}/{split_name}-{row:08d}", label)
            for row, label in enumerate(labels)
        ]
        name = f"{root}, split {split_name}, images in {self.column}, labels in {column or 'none'}"
        report_found(name, len(table), self.classes, {})
        self.table = table.select_columns([self.column])

    def _labels(self, table: Any, column: str) -> tuple[list[str], list[int]]:
        """Return the names of the classes, and the label of each row."""
        labels: list[Any] = table.data.column(column).to_pylist()
        names = getattr(table.features[column], "names", None)
        if column_kind(table.features[column]) in ("strings", "booleans"):
            names = sorted({str(label) for label in labels if label is not None})
            numbers = {name: number for number, name in enumerate(names)}
            labels = [None if label is None else numbers[str(label)] for label in labels]
        # Each class has at least one image, so there are at most as many classes as rows.
        limit = len(labels) if names is None else len(names)
        for row, label in enumerate(labels):
            if label is None or not 0 <= label < limit:
                raise UserError(
                    f"row {row} of {self.root} has {label} in column {column}, which is not the "
                    "number of a class; name another column with --label_column"
                )
        count = limit if names is not None else max(labels) + 1
        digits = len(str(count - 1))
        if names is None:
            return [f"{label:0{digits}d}" for label in range(count)], labels
        if names == sorted(names) and all(re.fullmatch(r"[^./][^/]*", name) for name in names):
            return names, labels
        numbered = [
            f"{label:0{digits}d} {name.replace('/', '_')}" for label, name in enumerate(names)
        ]
        return numbered, labels

    def read(self, index: int) -> Image.Image:
        """Return image ``index`` as RGB; UserError if it cannot be read."""
        cell = self._cell(index)
        file = cell if isinstance(cell, str) else io.BytesIO(cell)
        return read_image(file, f"{self.name(index)} of {self.root}")

    def content(self, index: int) -> bytes:
        """Return the bytes of image ``index``; OSError if its file cannot be read."""
        cell = self._cell(index)
        return Path(cell).read_bytes() if isinstance(cell, str) else cell

    def _cell(self, index: int) -> str | bytes:
        """Return the bytes of image ``index``, or its path in a data set of files."""
        cell = self.table[index][self.column]
        if isinstance(cell, dict):
            cell = cell["bytes"] or cell.get("path")
        return cell or b""

    def name(self, index: int) -> str:
        """Return ``class/split-number`` of image ``index``."""
        return self.samples[index][0]


#: Images and labels, whatever they are stored in: ``root``, ``classes``, ``samples`` (name and
#: label of each image), ``read(index)``, ``content(index)`` and ``name(index)``.
Source = Folder | Rows


def open_table(root: str, split: str) -> tuple[Any, str]:
    """Open the rows of ``train`` or ``val``.

    Returns:
        a ``datasets.Dataset`` that does not decode images, and the data set's name of the split.

    Raises:
        UserError: see :class:`Rows`.
    """
    try:
        import datasets  # optional
    except ModuleNotFoundError as error:
        raise UserError(
            f"{root} needs a package that is not installed: pip install datasets"
        ) from error
    if not distributed.is_main_process():
        datasets.disable_progress_bars()
    if address := ADDRESS.fullmatch(root):
        location = address.groupdict()
    elif root.startswith("hf:/"):
        raise UserError(
            f"{root} is no data set on the Hub: write "
            "hf://datasets/owner/name[@revision][/configuration]"
        )
    elif Path(root).is_dir():
        location = {"path": os.path.abspath(root)}
    else:
        location = {"path": "parquet", "data_files": os.path.abspath(root)}
    try:
        builder = datasets.load_dataset_builder(**location)
        builder.download_and_prepare()
        split_names = list(builder.info.splits)
        split_name = find_split(root, split_names, split)
        if split_name is None:
            known = " or ".join(chain(*SPLITS[split]))
            raise NoSplit(f"{root} has no split {known}: it has {', '.join(split_names)}")
        table = builder.as_dataset(split_name)
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        return table, split_name
    except UserError:
        raise
    except Exception as error:  # files, formats and the network fail in many ways
        # The message of this error is generic; that of its cause is not.
        generic = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = (error.__cause__ if generic else None) or error
        message = str(cause) or type(cause).__name__
        message = textwrap.shorten(message, 300)  # some messages are tables
        files = "the network, and the account (hf auth login)" if address else "path and files"
        disk = f"the disk of {datasets.config.HF_DATASETS_CACHE}"
        raise UserError(
            f"cannot open {root} ({message}); check {files}, or {disk}, and start again"
        ) from error


def column_kind(feature: Any) -> str:
    """Return the kind of a column's values, as in :data:`COLUMNS`.

    Other kinds are ``floating-point numbers`` and the names of all other types.
    """
    dtype = str(getattr(feature, "dtype", type(feature).__name__))
    if hasattr(feature, "names"):
        return "classes"
    if dtype == "PIL.Image.Image":
        return "images"
    if dtype.endswith("binary") or (isinstance(feature, dict) and "bytes" in feature):
        return "bytes"
    kinds = {
        r"u?int\d+": "integers",
        r"(large_)?string(_view)?": "strings",
        "bool": "booleans",
        r"(half)?float\d*|double": "floating-point numbers",
    }
    return next((kind for pattern, kind in kinds.items() if re.fullmatch(pattern, dtype)), dtype)


def describe_columns(table: Any) -> str:
    """Return text with the name and kind of each column."""
    return ", ".join(f"{name} ({column_kind(feature)})" for name, feature in table.features.items())


def find_column(root: str, table: Any, content: str, requested: str | None) -> str | None:
    """Return the column of images or labels: the requested or the most likely one.

    Args:
        root: the data set, for messages.
        table: its rows.
        content: ``"image"`` or ``"label"``.
        requested: the name of the column, if the user gives one.

    Returns:
        the name of the column; None if there is none.

    Raises:
        UserError: the requested column does not exist, or is of another kind.
    """
    allowed_kinds, name_groups = COLUMNS[content]
    kinds = {name: column_kind(feature) for name, feature in table.features.items()}
    if requested is not None:
        if kinds.get(requested) not in allowed_kinds:
            raise UserError(
                f"--{content}_column {requested}: {root} has no such column of {content}s; its "
                f"columns are {describe_columns(table)}"
            )
        return requested

    def rank(name: str) -> int:
        groups = enumerate(name_groups)
        return next((i for i, group in groups if name.lower() in group), len(name_groups))

    # Columns of these kinds hold nothing but images or classes, so their names do not matter.
    unambiguous = ("images", "bytes", "classes")
    candidates = [
        name
        for name, kind in kinds.items()
        if kind in allowed_kinds and (kind in unambiguous or rank(name) < len(name_groups))
    ]
    return min(
        candidates, key=lambda name: (allowed_kinds.index(kinds[name]), rank(name)), default=None
    )


def find_label_column(
    root: str, table: Any, image_column: str, requested: str | None
) -> str | None:
    """Return the column of labels: the requested or the most likely one; None for one class.

    Raises:
        UserError: the requested column does not exist or is of another kind. Or none is requested,
            and the only candidate is a column that may hold labels, but need not.
    """
    if requested == NO_LABELS and NO_LABELS not in table.features:
        return None
    column = find_column(root, table, "label", requested)
    if column is not None:
        return column
    image_kinds, _ = COLUMNS["image"]
    label_kinds, _ = COLUMNS["label"]
    for name, feature in table.features.items():
        kind = column_kind(feature)
        if name == image_column or kind in image_kinds:
            continue
        repeats = (
            kind in ("strings", "booleans")
            and len(table.data.column(name).unique()) <= len(table) // 2
        )
        if repeats or LABEL_LIKE.search(name):
            usable = kind in label_kinds
            advice = f"pass --label_column {name}" if usable else "make them integers or strings"
            raise UserError(
                f"{root} may have labels in column {name} ({kind}): {advice}, or pass "
                f"--label_column {NO_LABELS} for images of one class"
            )
    return None


# --------------------------------------------------------------------------------------------------
# Splits


class NoSplit(UserError):
    """There is no such split. Any other UserError means that it exists, or may exist."""


def find_split(root: str | Path, names: Iterable[str], split: str) -> str | None:
    """Return which of ``names``, of folders or of splits, is ``train`` or ``val``; None if none is.

    Raises:
        UserError: several names mean the split.
    """
    for group in SPLITS[split]:
        candidates = sorted(name for name in names if name.lower() in group)
        if len(candidates) > 1:
            raise UserError(
                f"{root} has {' and '.join(candidates)}, either of which may be the split {split}: "
                "rename or move one of them"
            )
        if candidates:
            return candidates[0]
    return None


def find_split_folders(root: Path) -> dict[str, Path]:
    """Return the folders in ``root`` that are ``train`` and ``val``, by split.

    A split without a folder is missing in the result. In a folder of classes it is empty.

    Raises:
        UserError: it is not clear whether folders are splits or classes, or which one is a split.
    """
    with os.scandir(root) as entries:
        names = sorted(
            entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir()
        )
    splits = {split: name for split in SPLITS if (name := find_split(root, names, split))}
    split_like = {
        split: [name for name in names if pattern.fullmatch(name)]
        for split, pattern in SPLIT_LIKE.items()
    }
    advice = "if they are classes, put all class folders into a folder train/"
    if not splits and all(split_like.values()):
        both = " and ".join(candidates[0] for candidates in split_like.values())
        raise UserError(
            f"{root} has {both}: if these are splits, rename them to train and val; {advice}"
        )
    if len(splits) == 1:  # with both, no class can have such a name
        (split_name,) = splits.values()
        others = [
            name
            for name in names
            if name != split_name and name.lower() not in chain(*SPLITS["val"])
        ]
        others = [in_one_line(name) for name in others if any(find_files(root / name)[0].values())]
        if others:
            raise UserError(
                f"{root} has {split_name} beside {', '.join(others[:4])}, which hold images, too: "
                f"if {split_name} is a split, move the others out of {root}, or into "
                f"{root / 'train'}; {advice}"
            )
    return {split: root / name for split, name in splits.items()}


def images_root(path: str | Path, split: str) -> Path | str:
    """Return the location of the images of ``train`` or ``val``.

    For a data set in rows it is ``path`` as a string. Otherwise it is the folder of the split in
    ``path`` (:data:`SPLITS`, in any capitalization). If there are no such folders, all of ``path``
    is for training.

    Raises:
        UserError: there is no folder ``path``, or it is not clear which folder is the split.
        NoSplit: there is no folder of the split.
    """
    if holds_rows(path):
        return str(path)
    root = existing_folder(path, "image folder")
    folders = find_split_folders(root)
    if split in folders or (split == "train" and not folders):
        return folders.get(split, root)
    known = ", ".join(f"{name}/" for name in chain(*SPLITS[split]))
    message = f"no image folder at {root / split}: {root} has none of {known}"
    if split == "train":
        val = folders["val"]
        message += (
            f", but held-out images in {val}: move the training images to {root / split}, or pass "
            f"{val} itself to train on these"
        )
    raise NoSplit(message)


def open_images(
    path: str | Path, split: str, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """Open the images of ``train`` or ``val`` in ``path``; UserError if there are none."""
    root = images_root(path, split)
    if split == "val" and isinstance(root, Path):
        train = find_split_folders(Path(path)).get("train")
        if train is not None and train.resolve() == root.resolve():
            warn(
                "%s is the folder of the training images: metrics on it are not held-out",
                root,
            )
    return Folder(root) if isinstance(root, Path) else Rows(root, split, image_column, label_column)


def open_unlabeled(path: str | Path) -> Source:
    """Open the training images in ``path`` without labels; UserError if there are none."""
    root = images_root(path, "train")
    if isinstance(root, Path):
        return AllImages(root)
    return Rows(root, "train", label_column=NO_LABELS)
