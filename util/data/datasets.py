"""Data sets of images, and what they share with cached moments: mirroring, unreadable items."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from util import distributed
from util.crop import center_crop_arr
from util.data.sources import Folder, Source, open_unlabeled, read_image
from util.errors import UserError, reason
from util.files import read_arrays
from util.log import log, warn


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as float32 ``[3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def cropped_pixels(image: Image.Image, img_size: int) -> Tensor:
    """Return ADM's center crop of an image, float32 ``[3, img_size, img_size]`` in [-1, 1]."""
    return to_pixels(center_crop_arr(image, img_size))


def image_transform(img_size: int) -> Callable[[Image.Image], Tensor]:
    """Return :func:`cropped_pixels` for one size."""
    # A partial, not a lambda: worker processes that are not forked unpickle it.
    return partial(cropped_pixels, img_size=img_size)


class TrainingItems(Dataset):
    """Base of data sets for training: mirrors items at random, and replaces unreadable ones.

    By default each random choice comes from torch's global generator. After :meth:`set_draws` the
    choice for an item depends only on seed, epoch and index. It is then the same on every rank, in
    every worker and each time the item is read.

    Attributes:
        root: where the items come from.
        mirror: mirror each item with probability 1/2.
        bad_images: the list of unreadable items. With None an unreadable item is an error, as in
            measurements.
    """

    root: str | Path
    mirror: bool
    bad_images: "BadImages | None" = None
    draws: tuple[int, int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int, mirrored: bool = False) -> tuple:
        """Return the tensor and the label of item ``index``; UserError if it cannot be read."""
        raise NotImplementedError

    def set_draws(self, seed: int, epoch: int) -> None:
        """Set seed and epoch of the random choices, in this process and workers started later."""
        self.draws = (seed, epoch)

    def mirrored(self, index: int) -> bool:
        """Return whether item ``index`` is mirrored, which has probability 1/2."""
        if self.draws is None:
            return bool(torch.rand(()) < 0.5)
        return bool(np.random.SeedSequence((*self.draws, index)).generate_state(1)[0] & 1)

    def read_unless_bad(self, index: int, mirrored: bool = False) -> tuple | None:
        """Return an item; None if it cannot be read and ``bad_images`` lists it."""
        try:
            return self.read(index, mirrored)
        except UserError as error:
            if self.bad_images is None:
                raise
            self.bad_images.add(error)
            return None

    def __getitem__(self, index: int) -> tuple:
        """Return the tensor and the label of item ``index``, or of the next readable one."""
        if index >= len(self):
            raise IndexError(index)  # ends an iteration over the data set
        mirrored = self.mirror and self.mirrored(index)
        for candidate in chain(range(index, len(self)), range(index)):
            if item := self.read_unless_bad(candidate, mirrored):
                return item
        raise UserError(f"none of the images in {self.root} can be read")


class BadImages:
    """List of the images that a run cannot read, in files, as workers of a loader share no memory.

    Each rank and its workers append a line with path and reason to
    ``folder/bad_images-rank<n>.txt``. An image that is read again, in each epoch, is listed and
    counted once. If the file cannot be written, the image is logged.

    Args:
        folder: the folder of the files; None for a dry run, which logs each image instead.
        skip: list unreadable images and skip them (``--skip_bad_images``). Otherwise each of them
            is an error.
    """

    def __init__(self, folder: str | Path | None, skip: bool = True):
        self.folder = None if folder is None else Path(folder)
        self.skip = skip
        if self.folder is not None:
            self.path = self.folder / f"bad_images-rank{distributed.get_rank()}.txt"
            if skip:
                self.path.unlink(missing_ok=True)

    def add(self, error: UserError) -> None:
        """List an image by the error of reading it.

        Raises:
            UserError: images are not skipped. The error says which flag skips them.
        """
        if not self.skip:
            raise UserError(f"{error}, or skip such images with --skip_bad_images") from error
        if self.folder is None:
            log.warning("%s; skipped", error)
            return
        line = str(error).encode(errors="surrogateescape").replace(b"\n", b" ") + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that each line is one write: lines of several workers do not mix.
            with open(self.path, "a+b", buffering=0) as file:
                file.seek(0)
                if line not in file.readlines():
                    file.write(line)
        except OSError as write_error:
            log.warning(
                "%s; skipped, and not listed: cannot write %s (%s)",
                error,
                self.path,
                reason(write_error),
            )

    def count(self) -> int:
        """Return the number of images that all ranks have listed so far; warn if there are any."""
        if not self.skip or self.folder is None:
            return 0
        lines: set[bytes] = set()
        for rank in range(distributed.get_world_size()):
            with suppress(OSError):  # there is no such file, or the disk does not respond
                path = self.folder / f"bad_images-rank{rank}.txt"
                lines.update(path.read_bytes().splitlines())
        if lines:
            warn(
                "%d images cannot be read and are skipped: %s/bad_images-rank*.txt",
                len(lines),
                self.folder,
            )
        return len(lines)


class ImageFolder(TrainingItems):
    """Images and labels of a folder, or of any other source in :mod:`util.data.sources`.

    Args:
        source: a folder ``source/<class>/<image>``, or the result of
            :func:`util.data.sources.open_images`.
        transform: applied to each image. With ``mirror`` it must return a tensor ``[3, H, W]``.
        mirror: mirror each image with probability 1/2.
        bad_images: see :class:`TrainingItems`.

    Attributes:
        root, classes, samples: those of the source.

    Raises:
        UserError: there is no such folder, or a class has no images.
    """

    def __init__(
        self,
        source: str | Path | Source,
        transform: Callable[[Image.Image], Any] | None = None,
        mirror: bool = False,
        bad_images: BadImages | None = None,
    ):
        self.source = Folder(source) if isinstance(source, str | Path) else source
        self.root = self.source.root
        self.classes = self.source.classes
        self.samples = self.source.samples
        self.transform = transform
        self.mirror = mirror
        self.bad_images = bad_images
        if empty := set(range(len(self.classes))).difference(label for _, label in self.samples):
            raise UserError(
                f"{self.root} has no images of class {self.classes[min(empty)]}; add some, or "
                "remove the class"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int, mirrored: bool = False) -> tuple:
        """Return the transformed image and the label of item ``index``.

        Raises:
            UserError: the image cannot be read or cropped.
        """
        path, label = self.samples[index]
        image: Any = self.source.read(index)
        try:
            image = image if self.transform is None else self.transform(image)
        except (ValueError, MemoryError) as error:
            raise UserError(f"cannot crop image {path} ({error}); replace or remove it") from error
        return (image.flip(2) if mirrored else image), label


class ImageFolderWithFilename(ImageFolder):
    """Items are image, label and ``class/file``. None is mirrored or replaced by another one."""

    def __getitem__(self, index: int):
        return *self.read(index), self.source.name(index)


class PlainImages(Dataset):
    """Images without labels as bytes ``[3, H, W]``, in sorted order.

    Args:
        source: a folder, of which subfolders count, or a data set in rows, of which the ``train``
            split is read if there are several (:func:`util.data.sources.open_unlabeled`); or an
            ``.npz`` with ``arr_0``, uint8 ``[N, H, W, 3]`` (ADM's layout).
        img_size: crop and resize to this size as in training. By default images are unchanged.
        paths: the image files to read, in this order. By default all images of ``source``.

    Raises:
        UserError: there is no such folder or file, or it holds no images.
    """

    def __init__(
        self, source: str | Path, img_size: int | None = None, paths: Sequence[Path] | None = None
    ):
        self.source = Path(source)
        self.img_size = img_size
        self.opened: Source | None = None
        self.items: Sequence[str | Path] | np.ndarray
        if paths is not None:
            self.items = paths
        elif self.source.suffix == ".npz":
            array = read_arrays(self.source, "arr_0")["arr_0"]
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
                raise UserError(
                    f"{self.source}: arr_0 is {array.dtype} {list(array.shape)}, expected uint8 "
                    "[N, H, W, 3]"
                )
            self.items = array
        else:
            self.opened = open_unlabeled(source)
            self.items = [name for name, _ in self.opened.samples]
        if not len(self.items):
            raise UserError(f"{self.source} holds no images")
        self.size = self._read(0).size  # of the first image; all others must have it

    def uncropped(self) -> "PlainImages":
        """Return a data set of the same images without crop and resizing."""
        images = copy(self)
        images.img_size = None
        images.size = images._read(0).size
        return images

    def __len__(self) -> int:
        return len(self.items)

    def _read(self, index: int) -> Image.Image:
        if self.opened is not None:
            image = self.opened.read(index)
        else:
            item = self.items[index]
            image = Image.fromarray(item) if isinstance(item, np.ndarray) else read_image(str(item))
        try:
            return image if self.img_size is None else center_crop_arr(image, self.img_size)
        except ValueError as error:
            name = index if isinstance(self.items, np.ndarray) else self.items[index]
            raise UserError(f"cannot crop image {name} ({error})") from error

    def __getitem__(self, index: int) -> Tensor:
        image = self._read(index)
        if image.size != self.size:  # not in an array, whose images have one size
            raise UserError(
                f"{self.items[index]} has {image.width}x{image.height} pixels, {self.items[0]} has "
                f"{self.size[0]}x{self.size[1]}: images to measure must be of one size"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
