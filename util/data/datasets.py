"""Data sets of images."""

from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from util import distributed
from util.crop import center_crop_arr
from util.data.sources import Folder, Rows
from util.errors import UserError, reason
from util.log import log, warn


def to_pixels(image: Image.Image) -> Tensor:
    """An image as float32 ``[3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def image_transform(img_size: int) -> transforms.Compose:
    """ADM's centre crop to ``img_size``, then :func:`to_pixels`."""
    # A partial, not a lambda: worker processes that are not forked unpickle it.
    return transforms.Compose([partial(center_crop_arr, image_size=img_size), to_pixels])


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
