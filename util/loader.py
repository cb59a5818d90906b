"""Data: images, folders of cached moments, samplers and loaders."""

import argparse
import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset, default_collate
from torchvision import transforms

from util.args import check_range
from util.classes import all_numbers, comparable
from util.crop import center_crop_arr
from util.errors import UserError, reason, some
from util.files import inside, read_arrays
from util.misc import get_rank, get_world_size, log, warn
from util.sources import Folder, Rows, existing_folder, find_class_folders

#: The description of a cache, and of a packed one: tokenizer, image size, number of images.
CACHE_METADATA, PACKED_METADATA = "cache.json", "packed.json"
#: What a cache holds of each image: moments of itself, and of its mirror image.
VIEWS = ("moments", "moments_flip")
#: And the SHA-256 of the image's file, uint8 ``[32]``; caches of MAR and of earlier versions have none.
IMAGE_HASH = "image_sha256"

# --------------------------------------------------------------------------------------------------------------------
# Images.


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
            self.path = self.folder / f"bad_images-rank{get_rank()}.txt"
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
            with open(self.path, "a+b", buffering=0) as file:  # one write a line: workers' lines do not mix
                file.seek(0)
                if line not in file.readlines():
                    file.write(line)
        except OSError as failed:
            log.warning("%s; left out, and not listed: cannot write %s (%s)", error, self.path, reason(failed))

    def count(self) -> int:
        """The number of bad images that all processes have listed so far; a warning tells it if there are any."""
        if not self.skip or self.folder is None:
            return 0
        paths = [self.folder / f"bad_images-rank{rank}.txt" for rank in range(get_world_size())]
        lines: set[bytes] = set()
        for path in paths:
            with suppress(OSError):  # there is none, or the disk does not answer
                lines.update(path.read_bytes().splitlines())
        if lines:
            warn("%d images cannot be read and are left out: %s/bad_images-rank*.txt", len(lines), self.folder)
        return len(lines)


class ImageFolder(TrainingItems, Dataset):
    """Images and labels, of a folder or of whatever else :mod:`util.sources` opens.

    Args:
        source: a folder ``source/<class>/<image>``, or what :func:`util.sources.open_images` returns.
        transform: of the image; must give a tensor ``[3, H, W]`` where ``mirror`` is set.
        mirror: mirror each image with probability 1/2.
        bad_images: see :class:`TrainingItems`.

    Attributes:
        root, classes, samples: as of the source.

    Raises:
        UserError: there is no such folder, or a class has no images.
    """

    def __init__(
        self, source: str | Path | Folder | Rows, transform=None, mirror=False, bad_images: BadImages | None = None
    ):
        self.source = source if isinstance(source, Folder | Rows) else Folder(source)
        self.root, self.classes, self.samples = self.source.root, self.source.classes, self.source.samples
        self.transform, self.mirror, self.bad_images = transform, mirror, bad_images
        if empty := set(range(len(self.classes))).difference(label for _, label in self.samples):
            raise UserError(f"{self.root} has no images of class {self.classes[min(empty)]}; add some, or leave it out")

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


def image_hash(source: Folder | Rows, index: int) -> np.ndarray:
    """Return the SHA-256 of the file of image ``index``, or of the bytes in its row, as uint8 ``[32]``.

    Raises:
        UserError: the file cannot be read.
    """
    content: Any = source.samples[index][0]
    if isinstance(source, Rows):
        content = source.table[index][source.column]
        content = content["bytes"] or content.get("path") if isinstance(content, dict) else content
    try:
        data = Path(content).read_bytes() if isinstance(content, str) else content or b""
    except OSError as error:
        raise UserError(f"cannot read image {content} ({error.strerror}); replace or remove it") from error
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint8).copy()  # writable, as torch wants it


class ImagesToCache(ImageFolder):
    """The images that a cache lacks, or has moments of other bytes for; None for all others, and for bad ones.

    Items are image, label, ``class/file``, and the image's :func:`image_hash`.

    Args:
        shape: of the moments; those of another shape are replaced.

    Attributes:
        not_compared: bool ``[N]``, true for images whose cached moments have no hash; the loader's workers share its
            memory.
    """

    def __init__(self, *args, cached_path: str | Path, shape: tuple[int, ...], **kwargs):
        super().__init__(*args, **kwargs)
        self.cached_path, self.shape = cached_path, shape
        self.not_compared = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def is_cached(self, index: int) -> bool:
        """Return whether the cache has whole moments of image ``index``, and of its present bytes."""
        path = cached_file(self.cached_path, self.source.name(index))
        try:
            if not path.exists() or any(CachedFolder.read_moments(path, view).shape != self.shape for view in VIEWS):
                return False
            stored = read_arrays(path, optional=[IMAGE_HASH]).get(IMAGE_HASH)
            self.not_compared[index] = stored is None
            return stored is None or np.array_equal(stored, image_hash(self.source, index))
        except UserError:  # damaged
            return False

    def read(self, index: int, mirrored: bool = False) -> tuple:
        # The hash first: if the file is replaced in between, the next run finds that it differs.
        digest = image_hash(self.source, index)
        return *super().read(index, mirrored), self.source.name(index), digest

    def __getitem__(self, index: int):
        if self.is_cached(index):
            return None
        item = self.read_unless_bad(index)
        if item is None:  # cached moments are those of a former image, or damaged
            cached_file(self.cached_path, self.source.name(index)).unlink(missing_ok=True)
        return item

    def check_others(self) -> None:
        """Raise UserError if the cache holds moments of other images, or cannot hold those of some of these."""
        names = {str(cached_file("", self.source.name(index))) for index in range(len(self))}
        there = [
            os.path.relpath(os.path.join(folder, file), self.cached_path)
            for folder, _, files in os.walk(self.cached_path, followlinks=True)
            for file in files
            if file.endswith(".npz")
        ]
        if others := sorted(set(there) - names):
            raise UserError(
                f"{self.cached_path} holds {len(others)} files of images that are not in {self.root}: {some(others)}; "
                "delete them, or choose another --cached_path"
            )


def cached_file(cached_path: str | Path, name: str) -> Path:
    """The file of a cache for the moments of image ``name``, ``class/file``."""
    return inside(cached_path, f"{name}.npz")


def collate_present(items: list) -> list | None:
    """A batch of the items that are not None, or None if all are."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None


# --------------------------------------------------------------------------------------------------------------------
# Cached moments.


class CachedFolder(TrainingItems, Dataset):
    """``root/<class>/<image name>.npz`` with ``moments`` and ``moments_flip``, as main_cache.py and MAR write them.

    Items are moments ``[2C, h, w]``, float32, not scaled, and the label; with ``mirror`` the moments are those of the
    mirror image with probability 1/2.

    Attributes:
        metadata: the tokenizer's ``latent_factor`` and ``vae``, and ``img_size``, as main_cache.py stored them; empty
            for a cache without ``cache.json``, which is KL-16's.
        shape: a run sets it to the shape that moments must have.

    Raises:
        UserError: there is no such folder, it holds no cached files, or not as many as ``cache.json`` says.
    """

    def __init__(self, root: str | Path, mirror: bool = True):
        self.root, self.mirror = existing_folder(root, "cache"), mirror
        found, _, _ = find_class_folders(self.root, (".npz",))
        if not found or not all(found.values()):
            where = next((self.root / name for name, paths in found.items() if not paths), root)
            raise UserError(f"{where} holds no cached moments (<class>/<file>.npz); make them with main_cache.py")
        self.classes = list(found)
        self.samples = [(path, label) for label, name in enumerate(found) for path in found[name]]
        self.shape: tuple[int, ...] | None = None
        self.metadata = read_cache_metadata(self.root) or {}
        planned = self.metadata.get("images", len(self.samples))
        if len(self.samples) < planned or not self.metadata.get("complete", True):
            raise UserError(f"{root} is incomplete: {len(self.samples)} of {planned} files; run main_cache.py again")
        if len(self.samples) > planned:
            raise UserError(
                f"{root} holds {len(self.samples)} files, but was made of {planned} images: some are of images that "
                "are gone, or of other data; make it anew in another folder"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int, mirrored: bool = False) -> tuple[Tensor, int]:
        """Moments and label of item ``index``; UserError if they cannot be read."""
        return self.view(index, int(mirrored)), self.samples[index][1]

    def name(self, index: int) -> str:
        """``class/file`` of image ``index``, as the folder of images names it."""
        return str(Path(self.samples[index][0]).relative_to(self.root)).removesuffix(".npz")

    def view(self, index: int, which: int) -> Tensor:
        """``moments`` (0) or ``moments_flip`` (1), float32 ``[2C, h, w]``; UserError if not of :attr:`shape`."""
        path = self.samples[index][0]
        moments = self.read_moments(path, VIEWS[which])
        if self.shape is not None and moments.shape != self.shape:
            shapes = f"{list(moments.shape)}, others {list(self.shape)}"
            raise UserError(f"cached moments {path} are {shapes}; renew them with main_cache.py")
        return moments

    @staticmethod
    def read_moments(path: str | Path, name: str = "moments") -> Tensor:
        """``moments`` or ``moments_flip``, ``[2C, h, w]``, of one file; UserError unless whole and finite floats."""
        try:
            values = read_arrays(path, name)[name]
            if values.dtype.kind != "f" or values.ndim != 3 or values.shape[0] % 2 or not values.size:
                raise UserError(f"{name} is {values.dtype} {list(values.shape)}, not floats [2C, h, w]")
            with np.errstate(over="ignore"):
                moments = torch.from_numpy(values.astype(np.float32))
            if not moments.isfinite().all():
                raise UserError(f"{name} is not finite")
        except UserError as error:
            raise UserError(f"cannot read cached moments {path} ({error}); renew them with main_cache.py") from error
        return moments


def read_cache_metadata(root: str | Path) -> dict | None:
    """The content of a cache's ``cache.json``; None without one, UserError if it is damaged."""
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


def check_classes(
    classes: Sequence[str],
    class_num: int,
    root: str | Path,
    trained: Sequence[str] | None = None,
    held_out: bool = False,
) -> list[int]:
    """Check ``root``'s ``classes`` against those that were ``trained``, and return the label of each.

    That is the position of the class. Of held-out classes it is the label of the trained class of that name, or the
    number that the name is where trained classes have other names; if no name is common, positions count.

    Raises:
        UserError: the classes are not ``class_num``, or not those that were ``trained``.
    """
    own, known = comparable(classes), comparable(trained or [])
    labels = list(range(len(classes)))
    if own == known:
        pass
    elif held_out and all_numbers(own) and not all_numbers(known):
        labels = [int(name) for name in own]
        if len(set(labels)) < len(labels) or max(labels) >= class_num:
            what = f"{root} has classes that are numbers, from {min(labels)} to {max(labels)}"
            raise UserError(f"{what}: they must be different ones of 0 to {class_num - 1}, the labels in training")
        log.info("%s: names of classes are numbers, and read as the labels in training", root)
    elif trained is None:
        pass
    elif held_out and sorted(own) == sorted(known):
        labels = [known.index(name) for name in own]
    elif not held_out or set(own) & set(known):
        sides = {"lacks": set(known) - set(own), "has besides": set(own) - set(known)}
        what = "; ".join(f"{verb} {some(sorted(names))}" for verb, names in sides.items() if names)
        what = f"{root} has other classes than the training images: it {what or 'orders them otherwise'}"
        hint = "; to train on these, start from the checkpoint by --finetune in another --output_dir"
        raise UserError(what if held_out else what + hint)
    elif len(known) == len(own):
        text = "%s has other names of classes than the training images: their order counts, %s is %s, ..., %s is %s"
        warn(text, root, classes[0], trained[0], classes[-1], trained[-1])
    if len(classes) != class_num:
        count, plural = len(classes), "es" if len(classes) > 1 else ""
        raise UserError(f"{root} has {count} class{plural}, but class_num is {class_num}: pass --class_num {count}")
    return labels


# --------------------------------------------------------------------------------------------------------------------
# Loaders.


def leave_signals_to_parent(worker: int) -> None:
    """Has a worker ignore the signals that ask a run to stop, which schedulers send to every process of a job.

    The parent still needs its workers until it has taken and saved a last step. A SIGTERM that the parent itself sends,
    as it does on its exit, ends the worker.
    """
    for name in ("SIGUSR1", "SIGINT"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal: there any SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Waits for a SIGTERM of the parent process, and ends this one."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def make_loader(dataset: Dataset, args: argparse.Namespace, device: torch.device, **options) -> DataLoader:
    """A DataLoader with the run's batch size and workers; ``options`` go to torch (``sampler``, ``drop_last``, ...)."""
    check_range(args, 0, math.inf, *(name for name in ("num_workers", "seed") if hasattr(args, name)))
    options = {"batch_size": args.batch_size, "persistent_workers": args.num_workers > 0, **options}
    options["worker_init_fn"] = leave_signals_to_parent
    pin = args.pin_mem and device.type == "cuda"
    return DataLoader(dataset, num_workers=args.num_workers, pin_memory=pin, **options)


def evenly_spaced(dataset: Dataset, limit: int) -> Subset:
    """At most ``limit`` items of ``dataset`` at equal distances, the first among them."""
    return Subset(dataset, range(0, len(dataset), -(-len(dataset) // limit)))


class ShuffledRankSampler(DistributedSampler):
    """A process's share of a shuffled epoch, without its first ``start`` items, seen before an interruption."""

    start = 0

    def __iter__(self):
        return islice(super().__iter__(), self.start, None)


class RankSampler(Sampler):
    """Every ``world_size``-th index from ``rank`` on, so that each index goes to one process."""

    def __init__(self, length: int, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)
