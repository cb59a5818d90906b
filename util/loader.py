"""Data: folders of images, folders of cached moments."""

import argparse
import json
import math
import os
import signal
import threading
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset, default_collate
from torchvision import datasets, transforms

from util.args import check_range
from util.crop import center_crop_arr
from util.errors import UserError, reason
from util.files import inside, read_arrays
from util.misc import get_rank, get_world_size, log

#: Beside the class folders of a cache: what the loaders of its moments need to know.
CACHE_METADATA = "cache.json"
#: In a packed cache, likewise.
PACKED_METADATA = "packed.json"

# --------------------------------------------------------------------------------------------------------------------
# Images.


def read_image(path: str) -> Image.Image:
    """The image in ``path`` as RGB, upright (EXIF), whatever its mode.

    Grey, palette, CMYK and 16-bit images are converted; transparency is dropped.

    Raises:
        UserError: it cannot be read, or its values have no known range (floating point).
    """
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise UserError(f"cannot read image {path} ({reason(error)}); replace or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` with 8 bits in each of three channels."""
    if image.mode.startswith(("I", "F")):  # Pillow would clip them at 255
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values of mode {image.mode} outside 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    return image.convert("RGB")


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


class MirrorDraws:
    """Decides which items of a data set are mirrored.

    By default from torch's global generator. Once :meth:`set_draws` has named a seed and an epoch, an item's coin
    follows from those and its index alone, whichever process or worker throws it, and however often.
    """

    draws: tuple[int, int] | None = None

    def set_draws(self, seed: int, epoch: int) -> None:
        """Fixes the coins of one epoch. Workers started before do not hear of it."""
        self.draws = (seed, epoch)

    def mirrored(self, index: int) -> bool:
        """Heads or tails for item ``index``."""
        if self.draws is None:
            return bool(torch.rand(()) < 0.5)
        return bool(np.random.SeedSequence((*self.draws, index)).generate_state(1)[0] & 1)


class BadImages:
    """The images of a run that could not be read: listed as loaders' workers meet them, counted at the end.

    Each process writes ``folder/bad_images-rank<n>.txt``, a line of path and reason for each; images met again, as in
    every epoch, count once.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / f"bad_images-rank{get_rank()}.txt"
        self.path.unlink(missing_ok=True)

    def add(self, error: UserError) -> None:
        """One of them, by what was said of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = str(error).encode(errors="surrogateescape").replace(b"\n", b" ") + b"\n"
        with open(self.path, "ab", buffering=0) as file:  # one write: workers share the file
            file.write(line)

    def count(self) -> int:
        """How many there are over all processes so far, said in the log if any."""
        paths = [self.folder / f"bad_images-rank{rank}.txt" for rank in range(get_world_size())]
        lines = {line for path in paths if path.exists() for line in path.read_bytes().splitlines()}
        if lines:
            log.warning("%d images cannot be read and are left out: %s/bad_images-rank*.txt", len(lines), self.folder)
        return len(lines)


class ImageFolder(MirrorDraws, datasets.ImageFolder):
    """torchvision's, with errors for users: ``root/<class>/<image>``, labels numbering the sorted folders.

    Args:
        transform: makes tensors ``[3, H, W]`` where ``mirror`` is set.
        mirror: mirror half of the images.
        bad_images: lists images that cannot be read, and the next one that can takes their place; by default they
            are errors.

    Raises:
        UserError: there is no such folder, it holds no class folders, or one without images.
    """

    def __init__(self, root: str | Path, transform=None, mirror: bool = False, bad_images: BadImages | None = None):
        existing_folder(root, "image folder")
        self.mirror, self.bad_images = mirror, bad_images
        try:
            super().__init__(str(root), transform=transform, loader=read_image)
        except FileNotFoundError as error:
            what = reason(error).rstrip(".")
            raise UserError(f"{root} is not a folder of class folders with images: {what}") from error

    def read(self, index: int) -> tuple:
        """Image (transformed) and label of item ``index`` itself.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return super().__getitem__(index)
        except (ValueError, MemoryError) as error:  # the crop's
            raise UserError(f"cannot crop image {self.samples[index][0]} ({error}); replace or remove it") from error

    def __getitem__(self, index: int):
        for candidate in chain(range(index, len(self)), range(index)):
            try:
                image, label = self.read(candidate)
            except UserError as error:
                if self.bad_images is None:
                    raise
                self.bad_images.add(error)
                continue
            return (image.flip(2) if self.mirror and self.mirrored(index) else image), label
        raise UserError(f"none of the images in {self.root} can be read")


class ImageFolderWithFilename(ImageFolder):
    """Items are image, label, and ``class/file``; neither mirrored nor replaced."""

    def __getitem__(self, index: int):
        return *self.read(index), self.name(index)

    def name(self, index: int) -> str:
        """``class/file`` of item ``index``."""
        return str(Path(self.samples[index][0]).relative_to(self.root))


class ImagesToCache(ImageFolderWithFilename):
    """Items as of :class:`ImageFolderWithFilename`; None where whole moments are in the cache, or the image is bad.

    Args:
        cached_path: the cache.
        shape: of its moments, ``[2C, h, w]``.
    """

    def __init__(self, *args, cached_path: str | Path, shape: tuple[int, ...], **kwargs):
        super().__init__(*args, **kwargs)
        self.cached_path, self.shape = cached_path, shape

    def __getitem__(self, index: int):
        path = cached_file(self.cached_path, self.name(index))
        try:
            if path.exists() and all(
                CachedFolder.read_moments(path, name).shape == self.shape for name in ("moments", "moments_flip")
            ):
                return None
        except UserError:  # damaged: made anew
            pass
        try:
            return *self.read(index), self.name(index)
        except UserError as error:
            if self.bad_images is None:
                raise
            self.bad_images.add(error)
            return None


def cached_file(cached_path: str | Path, name: str) -> Path:
    """Where the moments of image ``name``, ``class/file``, lie in a cache."""
    return inside(cached_path, f"{name}.npz")


def collate_present(items: list) -> list | None:
    """A batch of the items that are not None; None if none is."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None


# --------------------------------------------------------------------------------------------------------------------
# Cached moments.


class CachedFolder(MirrorDraws, datasets.DatasetFolder):
    """``root/<class>/<image name>.npz`` with ``moments`` and ``moments_flip``, as main_cache.py and MAR write them.

    Items are moments ``[2C, h, w]``, float32, not scaled, of the image or (with ``mirror``) of its mirror image with
    equal probability, and the label.

    Attributes:
        metadata: what main_cache.py stored of the tokenizer (``latent_factor``, ``vae``, ``img_size``); empty for a
            cache without it, which is KL-16's.
        shape: what all moments must have, once the run has set it.

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
        self.shape: tuple[int, ...] | None = None
        self.metadata = read_cache_metadata(root) or {}
        planned = self.metadata.get("images", len(self.samples))
        if len(self.samples) < planned or not self.metadata.get("complete", True):
            raise UserError(f"{root} is incomplete: {len(self.samples)} of {planned} files; run main_cache.py again")
        if len(self.samples) > planned:
            raise UserError(
                f"{root} holds {len(self.samples)} files, but was made of {planned} images: some are of images that "
                "are gone, or of other data; make it anew in another folder"
            )

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        moments = self.read_moments(path, "moments_flip" if self.mirror and self.mirrored(index) else "moments")
        return self.checked(moments, path), label

    def checked(self, moments: Tensor, path: str) -> Tensor:
        """``moments`` themselves.

        Raises:
            UserError: their shape is not that of the others.
        """
        if self.shape is not None and moments.shape != self.shape:
            raise UserError(
                f"cached moments {path} are {list(moments.shape)}, others {list(self.shape)}; run main_cache.py again"
            )
        return moments

    @staticmethod
    def read_moments(path: str | Path, name: str = "moments") -> Tensor:
        """``moments`` or ``moments_flip``, ``[2C, h, w]``, of one file.

        Raises:
            UserError: the file is damaged, incomplete, or holds other values than finite floating-point ones.
        """
        try:
            values = read_arrays(path, name)[name]
            if values.dtype.kind != "f" or values.ndim != 3 or values.shape[0] % 2 or not values.size:
                raise UserError(f"{name} is {values.dtype} {list(values.shape)}, not floats [2C, h, w]")
            with np.errstate(over="ignore"):
                moments = torch.from_numpy(values.astype(np.float32))
            if not moments.isfinite().all():
                raise UserError(f"{name} is not finite")
        except UserError as error:
            raise UserError(f"cannot read cached moments {path} ({error}); run main_cache.py again") from error
        return moments


def read_cache_metadata(root: str | Path) -> dict | None:
    """What main_cache.py stored beside a cache's class folders; None for a cache without it.

    Raises:
        UserError: it is damaged.
    """
    path = Path(root) / CACHE_METADATA
    if not path.exists():
        return None
    try:
        metadata = json.loads(path.read_bytes())
        whole = isinstance(metadata, dict) and type(metadata.get("images", 0)) is int
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged; delete the cache and make it anew with main_cache.py")
    return metadata


def check_classes(classes: list[str], class_num: int, root: str | Path) -> None:
    """Raises UserError if the number of class folders under ``root`` is not ``class_num``."""
    if len(classes) != class_num:
        raise UserError(
            f"{root} has {len(classes)} class folders, but class_num is {class_num}: pass --class_num {len(classes)}"
        )


# --------------------------------------------------------------------------------------------------------------------
# Loaders.


def leave_signals_to_parent(worker: int) -> None:
    """Schedulers signal every process of a job: workers must live until the step they feed is taken and saved.

    Only the SIGTERM by which the parent ends its workers as it exits itself is obeyed: it waits for them.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # else (macOS) nothing tells who sent a signal: any SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends a worker as soon as its parent asks for it by SIGTERM; anybody else's passes unheard."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def make_loader(dataset: Dataset, args: argparse.Namespace, device: torch.device, **options) -> DataLoader:
    """A DataLoader with the run's batch size and workers; ``options`` as torch's (sampler, drop_last, ...)."""
    check_range(args, 0, math.inf, *(name for name in ("num_workers", "seed") if hasattr(args, name)))
    options = {"batch_size": args.batch_size, "persistent_workers": args.num_workers > 0, **options}
    options["worker_init_fn"] = leave_signals_to_parent
    pin = args.pin_mem and device.type == "cuda"
    return DataLoader(dataset, num_workers=args.num_workers, pin_memory=pin, **options)


def evenly_spaced(dataset: Dataset, limit: int) -> Subset:
    """At most ``limit`` items of ``dataset``, from its first on at equal distances."""
    return Subset(dataset, range(0, len(dataset), -(-len(dataset) // limit)))


class ShuffledRankSampler(DistributedSampler):
    """A process's share of a shuffled epoch, which can start in its middle.

    Attributes:
        start: items of the epoch to leave out, those seen before an interruption.
    """

    start = 0

    def __iter__(self):
        return islice(super().__iter__(), self.start, None)


class RankSampler(Sampler):
    """Every ``world_size``-th index from ``rank`` on: all of a dataset once over all processes, none twice."""

    def __init__(self, length: int, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)
