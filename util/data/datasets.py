"""Data sets of images."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from util import distributed
from util.crop import center_crop_arr
from util.data.sources import AllImages, Folder, Rows, open_unlabeled, read_image
from util.errors import UserError, reason
from util.files import read_arrays
from util.log import log, warn


def to_pixels(image: Image.Image) -> Tensor:
    """An image as float32 ``[3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def cropped_pixels(image: Image.Image, img_size: int) -> Tensor:
    """Return ADM's center crop of an image to ``img_size`` as :func:`to_pixels`."""
    return to_pixels(center_crop_arr(image, img_size))


def image_transform(img_size: int) -> Callable[[Image.Image], Tensor]:
    """Return :func:`cropped_pixels` for one size."""
    return partial(cropped_pixels, img_size=img_size)  # workers that are not forked unpickle it


class TrainingItems:
    """Decides which items of a data set are mirrored, and what takes the place of those that cannot be read.

    Subclasses define ``read(index, mirrored)``, which returns the tensor and the label of an item.

    Attributes:
        mirror: mirror each item with probability 1/2.
        bad_images: what happens to unreadable items; None: each is an error, as in measurements.

    By default each draw comes from torch's global generator. After :meth:`set_draws` an item's draw depends only on
    seed, epoch and index: it is the same in every process and worker, and each time it is made.
    """

    draws: tuple[int, int] | None = None
    mirror: bool
    bad_images: "BadImages | None" = None

    def set_draws(self, seed: int, epoch: int) -> None:
        """Fixes the draws of one epoch, for this process and the workers that it starts from now on."""
        self.draws = (seed, epoch)

    def mirrored(self, index: int) -> bool:
        """Whether item ``index`` is mirrored, with probability 1/2."""
        if self.draws is None:
            return bool(torch.rand(()) < 0.5)
        return bool(np.random.SeedSequence((*self.draws, index)).generate_state(1)[0] & 1)

    def read_unless_bad(self, index: int, mirrored: bool = False) -> tuple | None:
        """Return what ``read`` does, or None where ``bad_images`` lists the item instead of its error being raised."""
        try:
            return self.read(index, mirrored)
        except UserError as error:
            if self.bad_images is None:
                raise
            self.bad_images.add(error)
            return None

    def __getitem__(self, index: int) -> tuple:
        """Return the tensor and the label of item ``index``, or of the next one that can be read."""
        if index >= len(self):
            raise IndexError(index)  # which ends an iteration
        mirrored = self.mirror and self.mirrored(index)
        for candidate in chain(range(index, len(self)), range(index)):
            if item := self.read_unless_bad(candidate, mirrored):
                return item
        raise UserError(f"none of the images in {self.root} can be read")


class BadImages:
    """List of the images that a run could not read, kept in files, since the workers of a loader share no memory.

    Each process of the run and its workers append to ``folder/bad_images-rank<n>.txt`` a line with path and reason
    when they meet a bad image; one that is met again, as every epoch does, is listed and counted once. What cannot be
    listed is logged.

    Args:
        folder: of the files; None for a dry run, which writes nothing: there every bad image is logged.
        skip: whether images are listed and left out (``--skip_bad_images``); otherwise each is an error.
    """

    def __init__(self, folder: str | Path | None, skip: bool = True):
        self.folder, self.skip = None if folder is None else Path(folder), skip
        if self.folder is not None:
            self.path = self.folder / f"bad_images-rank{distributed.get_rank()}.txt"
            if skip:
                self.path.unlink(missing_ok=True)

    def add(self, error: UserError) -> None:
        """List an image by the error that reading it raised, or raise that error with the advice to skip."""
        if not self.skip:
            raise UserError(f"{error}, or leave such images out with --skip_bad_images") from error
        if self.folder is None:
            log.warning("%s; left out", error)
            return
        line = str(error).encode(errors="surrogateescape").replace(b"\n", b" ") + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(
                self.path, "a+b", buffering=0
            ) as file:  # one write a line: workers' lines do not mix
                file.seek(0)
                if line not in file.readlines():
                    file.write(line)
        except OSError as failed:
            log.warning(
                "%s; left out, and not listed: cannot write %s (%s)",
                error,
                self.path,
                reason(failed),
            )

    def count(self) -> int:
        """The number of bad images that all processes have listed so far; a warning tells it if there are any."""
        if not self.skip or self.folder is None:
            return 0
        paths = [
            self.folder / f"bad_images-rank{rank}.txt"
            for rank in range(distributed.get_world_size())
        ]
        lines: set[bytes] = set()
        for path in paths:
            with suppress(OSError):  # there is none, or the disk does not answer
                lines.update(path.read_bytes().splitlines())
        if lines:
            warn(
                "%d images cannot be read and are left out: %s/bad_images-rank*.txt",
                len(lines),
                self.folder,
            )
        return len(lines)


class ImageFolder(TrainingItems, Dataset):
    """Images and labels, of a folder or of whatever else :mod:`util.data.sources` opens.

    Args:
        source: a folder ``source/<class>/<image>``, or what :func:`util.data.sources.open_images` returns.
        transform: of the image; must give a tensor ``[3, H, W]`` where ``mirror`` is set.
        mirror: mirror each image with probability 1/2.
        bad_images: see :class:`TrainingItems`.

    Attributes:
        root, classes, samples: as of the source.

    Raises:
        UserError: there is no such folder, or a class has no images.
    """

    def __init__(
        self,
        source: str | Path | Folder | Rows,
        transform=None,
        mirror=False,
        bad_images: BadImages | None = None,
    ):
        self.source = source if isinstance(source, Folder | Rows) else Folder(source)
        self.root, self.classes, self.samples = (
            self.source.root,
            self.source.classes,
            self.source.samples,
        )
        self.transform, self.mirror, self.bad_images = transform, mirror, bad_images
        if empty := set(range(len(self.classes))).difference(label for _, label in self.samples):
            raise UserError(
                f"{self.root} has no images of class {self.classes[min(empty)]}; add some, or leave it out"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int, mirrored: bool = False) -> tuple:
        """Image (transformed) and label of item ``index``; UserError if it cannot be read."""
        image, (path, label) = self.source.read(index), self.samples[index]
        try:
            image = image if self.transform is None else self.transform(image)
        except (ValueError, MemoryError) as error:  # the crop's
            raise UserError(f"cannot crop image {path} ({error}); replace or remove it") from error
        return (image.flip(2) if mirrored else image), label


class ImageFolderWithFilename(ImageFolder):
    """Items are image, label and ``class/file``; none is mirrored or replaced by another."""

    def __getitem__(self, index: int):
        return *self.read(index), self.source.name(index)


class PlainImages(Dataset):
    """Byte images ``[3, H, W]``, sorted, of a folder and its subfolders, of a data set in rows, or of an npz.

    Args:
        source: what :func:`util.data.sources.open_unlabeled` opens: a folder, or a data set in rows, of which it is the
            ``train`` split if there are several; or an ``.npz`` with ``arr_0``, uint8 ``[N, H, W, 3]`` (ADM's layout).
        img_size: crop and resize to this size as for training; by default images stay as they are.
        paths: the files to take of a folder, in their order; by default all images in it.

    Raises:
        UserError: there is no such folder or file, or it holds no images.
    """

    def __init__(
        self, source: str | Path, img_size: int | None = None, paths: Sequence[Path] | None = None
    ):
        self.source, self.img_size = Path(source), img_size
        self.opened: AllImages | Rows | None = None
        if paths is not None:
            self.items = paths
        elif self.source.suffix == ".npz":
            self.items = read_arrays(self.source, "arr_0")["arr_0"]
            if self.items.dtype != np.uint8 or self.items.ndim != 4 or self.items.shape[3] != 3:
                found = f"{self.items.dtype} {list(self.items.shape)}"
                raise UserError(f"{self.source}: arr_0 is {found}, expected uint8 [N, H, W, 3]")
        else:
            self.opened = open_unlabeled(source)
            self.items = [name for name, _ in self.opened.samples]
        if not len(self.items):
            raise UserError(f"{self.source} holds no images")
        self.size = self._read(0).size  # of the first image, which all must have

    def uncropped(self) -> "PlainImages":
        """Return the same images as they are."""
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
        if image.size != self.size:  # in a folder: an array's images are alike
            raise UserError(
                f"{self.items[index]} has {image.size[0]}x{image.size[1]} pixels, {self.items[0]} has "
                f"{self.size[0]}x{self.size[1]}: images to measure must be of one size"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
