"""Data: folders of images, folders of cached moments."""

import argparse
import json
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision import datasets, transforms

from util.crop import center_crop_arr
from util.errors import UserError

#: Beside the class folders of a cache: what the loaders of its moments need to know.
CACHE_METADATA = "cache.json"

# --------------------------------------------------------------------------------------------------------------------
# Images.


def read_image(path: str) -> Image.Image:
    """The image in ``path`` as RGB.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read image {path} ({reason}); replace or remove it") from error


def to_pixels(image: Image.Image) -> Tensor:
    """An image as float32 ``[3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def image_transform(img_size: int) -> transforms.Compose:
    """ADM's centre crop, and pixels in [-1, 1]."""
    # No lambda: workers may have to unpickle it.
    return transforms.Compose([partial(center_crop_arr, image_size=img_size), to_pixels])


def existing_folder(root: str | Path, what: str) -> Path:
    """``root``, checked.

    Raises:
        UserError: it is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no {what} at {root}: it is not a folder; check the path")
    return root


class Coins:
    """Decides which items of a data set are mirrored.

    By default from torch's global generator. Once :meth:`set_draws` has named a seed and an epoch, an item's coin
    follows from those and its index alone, whichever process or worker throws it, and however often.
    """

    draws: tuple[int, int] | None = None

    def set_draws(self, seed: int, epoch: int) -> None:
        """Fixes the coins of one epoch. Workers started before do not hear of it."""
        self.draws = (seed, epoch)

    def coin(self, index: int) -> bool:
        """Heads or tails for item ``index``."""
        if self.draws is None:
            return bool(torch.rand(()) < 0.5)
        return bool(np.random.SeedSequence((*self.draws, index)).generate_state(1)[0] & 1)


class ImageFolder(Coins, datasets.ImageFolder):
    """torchvision's, with errors for users: ``root/<class>/<image>``, labels numbering the sorted folders.

    Args:
        transform: makes tensors ``[3, H, W]`` where ``mirror`` is set.
        mirror: mirror half of the images.

    Raises:
        UserError: there is no such folder, it holds no class folders, or one without images.
    """

    def __init__(self, root: str | Path, transform=None, mirror: bool = False):
        existing_folder(root, "image folder")
        self.mirror = mirror
        try:
            super().__init__(str(root), transform=transform, loader=read_image)
        except FileNotFoundError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"{root} is not a folder of class folders with images: {reason}") from error

    def __getitem__(self, index: int):
        image, label = super().__getitem__(index)
        return (image.flip(2) if self.mirror and self.coin(index) else image), label


class ImageFolderWithFilename(ImageFolder):
    """Items are image, label, and ``class/file``."""

    def __getitem__(self, index: int):
        return *super().__getitem__(index), str(Path(self.samples[index][0]).relative_to(self.root))


# --------------------------------------------------------------------------------------------------------------------
# Cached moments.


class CachedFolder(Coins, datasets.DatasetFolder):
    """``root/<class>/<image name>.npz`` with ``moments`` and ``moments_flip``, as main_cache.py and MAR write them.

    Items are moments ``[2C, h, w]``, float32, not scaled, of the image or (with ``mirror``) of its mirror image with
    equal probability, and the label.

    Attributes:
        metadata: what main_cache.py stored of the tokenizer (``latent_factor``, ``vae``, ``img_size``); empty for a
            cache without it, which is KL-16's.

    Raises:
        UserError: there is no such folder, no class folders with cached files, or fewer files than were to be cached.
    """

    def __init__(self, root: str | Path, mirror: bool = True):
        root = existing_folder(root, "cache")
        self.mirror = mirror
        try:
            super().__init__(str(root), loader=self.read_moments, extensions=(".npz",))
        except FileNotFoundError as error:
            raise UserError(
                f"{root} holds no cached moments (<class>/<file>.npz); make them with main_cache.py"
            ) from error
        self.metadata: dict = {}
        if (root / CACHE_METADATA).exists():
            try:
                self.metadata = json.loads((root / CACHE_METADATA).read_text())
            except ValueError as error:
                raise UserError(
                    f"{root / CACHE_METADATA} is damaged; make the cache anew with main_cache.py"
                ) from error
        planned = self.metadata.get("images", 0)
        if len(self.samples) < planned or not self.metadata.get("complete", True):
            raise UserError(f"{root} is incomplete: {len(self.samples)} of {planned} files; run main_cache.py again")

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return self.read_moments(path, "moments_flip" if self.mirror and self.coin(index) else "moments"), label

    @staticmethod
    def read_moments(path: str, name: str = "moments") -> Tensor:
        """``moments`` or ``moments_flip``, ``[2C, h, w]``, of one file.

        Raises:
            UserError: the file is damaged, incomplete, or holds values that are not finite.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                moments = torch.from_numpy(arrays[name].astype(np.float32))
            if moments.ndim != 3 or not moments.isfinite().all():
                raise ValueError(f"{name} is not finite, or not [2C, h, w]")
            return moments
        except Exception as error:  # zip, header and array errors have no common class
            raise UserError(
                f"cannot read cached moments {path} ({error}); delete it and run main_cache.py again"
            ) from error


def check_classes(classes: list[str], class_num: int, root: str | Path) -> None:
    """Raises UserError if the number of class folders under ``root`` is not ``class_num``."""
    if len(classes) != class_num:
        raise UserError(
            f"{root} has {len(classes)} class folders, but class_num is {class_num}: pass --class_num {len(classes)}"
        )


# --------------------------------------------------------------------------------------------------------------------
# Loaders.


def make_loader(dataset: Dataset, args: argparse.Namespace, device: torch.device, **options) -> DataLoader:
    """A DataLoader with the run's batch size and workers; ``options`` as torch's (sampler, drop_last, ...)."""
    options = {"batch_size": args.batch_size, "persistent_workers": args.num_workers > 0, **options}
    pin = args.pin_mem and device.type == "cuda"
    return DataLoader(dataset, num_workers=args.num_workers, pin_memory=pin, **options)


class ShuffledShare(DistributedSampler):
    """A process's share of a shuffled epoch, which can start in its middle.

    Attributes:
        start: items of the epoch to leave out, those seen before an interruption.
    """

    start = 0

    def __iter__(self):
        return islice(super().__iter__(), self.start, None)


class Share(Sampler):
    """Every ``world_size``-th index from ``rank`` on: all of a dataset once over all processes, none twice."""

    def __init__(self, length: int, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)
