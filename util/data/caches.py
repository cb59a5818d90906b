"""Data sets of cached moments, and of the images that still have to be cached."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from util.data.datasets import ImageFolder, TrainingItems
from util.data.sources import Source, existing_folder, find_class_folders
from util.errors import UserError, some
from util.files import inside, read_arrays, read_json

#: File names of the metadata of a cache and of a packed cache: tokenizer, image size, image count
CACHE_METADATA = "cache.json"
PACKED_METADATA = "packed.json"
#: Arrays in the file of an image: the moments of the image and of its mirror image
VIEWS = ("moments", "moments_flip")
#: Array with the SHA-256 of the image's file, uint8 ``[32]``. Caches of MAR and of earlier versions
#: do not have it.
IMAGE_HASH = "image_sha256"


def image_hash(source: Source, index: int) -> np.ndarray:
    """Return the SHA-256 of the file or bytes of image ``index``, uint8 ``[32]``.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = source.content(index)
    except OSError as error:
        raise UserError(
            f"cannot read image {source.samples[index][0]} ({error.strerror}); replace or remove it"
        ) from error
    digest = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    return digest.copy()  # torch needs a writable array


class ImagesToCache(ImageFolder):
    """Images that still have to be cached. Items that are cached or unreadable are None.

    An image is cached if its file in the cache is valid and is of the present bytes of the image.
    Other items are image, label, ``class/file`` and the image's :func:`image_hash`.

    Args:
        cached_path: the folder of the cache.
        shape: the shape of the moments. Moments of another shape are replaced.

    Attributes:
        not_compared: bool ``[N]``, true for images whose cached moments have no hash. The workers
            of a loader share its memory.
    """

    def __init__(self, *args, cached_path: str | Path, shape: tuple[int, ...], **kwargs):
        super().__init__(*args, **kwargs)
        self.cached_path = cached_path
        self.shape = shape
        self.not_compared = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def is_cached(self, index: int) -> bool:
        """Return whether the cache has valid moments of the present bytes of image ``index``."""
        path = cached_file(self.cached_path, self.source.name(index))
        try:
            if not path.exists():
                return False
            for view in VIEWS:
                if CachedFolder.read_moments(path, view).shape != self.shape:
                    return False
            stored_hash = read_arrays(path, optional=[IMAGE_HASH]).get(IMAGE_HASH)
            self.not_compared[index] = stored_hash is None
            return stored_hash is None or np.array_equal(
                stored_hash, image_hash(self.source, index)
            )
        except UserError:  # the cached file is damaged
            return False

    def read(self, index: int, mirrored: bool = False) -> tuple:
        """Return image, label, ``class/file`` and hash of image ``index``."""
        # The hash is read first: if the file is replaced in between, the next run finds that it
        # differs.
        digest = image_hash(self.source, index)
        return *super().read(index, mirrored), self.source.name(index), digest

    def __getitem__(self, index: int):
        if self.is_cached(index):
            return None
        item = self.read_unless_bad(index)
        if item is None:
            # The cached moments, if any, are damaged or of an earlier version of the image.
            cached_file(self.cached_path, self.source.name(index)).unlink(missing_ok=True)
        return item

    def check_others(self) -> None:
        """Check that the cache holds no moments of other images.

        Raises:
            UserError: it does, two images have the same name, or a name is not possible in it.
        """
        names = {str(cached_file("", self.source.name(index))) for index in range(len(self))}
        if len(names) < len(self):
            raise UserError(
                f"{self.root}: only {len(names)} of {len(self)} images have a name of their own, "
                "but a cache holds one file per name"
            )
        cached_names = {
            os.path.relpath(os.path.join(folder, file), self.cached_path)
            for folder, _, files in os.walk(self.cached_path, followlinks=True)
            for file in files
            if file.endswith(".npz")
        }
        if others := sorted(cached_names - names):
            raise UserError(
                f"{self.cached_path} holds {len(others)} files of images that are not in "
                f"{self.root}: {some(others)}; delete them, or choose another --cached_path"
            )


def cached_file(cached_path: str | Path, name: str) -> Path:
    """Return the path in a cache of the moments of image ``name`` (``class/file``)."""
    return inside(cached_path, f"{name}.npz")


def collate_present(items: list) -> list | None:
    """Return a batch of the items that are not None; None if all are."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None


class CachedFolder(TrainingItems):
    """A cache of one file per image, as main_cache.py and MAR write it.

    The files are ``root/<class>/<image name>.npz`` with ``moments`` and ``moments_flip``. Items are
    the moments, float32 ``[2C, h, w]``, not scaled, and the label; ``[C, h, w]`` for a
    deterministic tokenizer. With ``mirror`` the moments are those of the mirror image with
    probability 1/2.

    Attributes:
        classes: names of the class folders, sorted.
        samples: path and label of each file.
        metadata: content of ``cache.json``: among others ``latent_factor`` and ``vae`` of the
            tokenizer, and ``img_size``. It is empty if there is no such file: then the tokenizer is
            KL-16.
        shape: the shape that all moments must have; None allows any. A run sets it.

    Raises:
        UserError: there is no such folder, it holds no cached files, or not as many as
            ``cache.json`` says.
    """

    def __init__(self, root: str | Path, mirror: bool = True):
        self.root = existing_folder(root, "cache")
        self.mirror = mirror
        class_paths, _, _ = find_class_folders(self.root, (".npz",))
        empty = [self.root / name for name, paths in class_paths.items() if not paths]
        if empty or not class_paths:
            folder = empty[0] if empty else root
            raise UserError(
                f"{folder} holds no cached moments (<class>/<file>.npz); create them with "
                "main_cache.py"
            )
        self.classes = list(class_paths)
        self.samples = [
            (path, label) for label, name in enumerate(class_paths) for path in class_paths[name]
        ]
        self.shape: tuple[int, ...] | None = None
        self.metadata = read_cache_metadata(self.root) or {}
        count = len(self.samples)
        expected = self.metadata.get("images", count)
        if count < expected or not self.metadata.get("complete", True):
            raise UserError(
                f"{root} is incomplete: {count} of {expected} files; run main_cache.py again"
            )
        if count > expected:
            raise UserError(
                f"{root} holds {count} files, but was created from {expected} images: some files "
                "are of images that no longer exist, or of other data; regenerate the cache in "
                "another folder"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int, mirrored: bool = False) -> tuple[Tensor, int]:
        """Return moments and label of item ``index``; UserError if they cannot be read."""
        return self.view(index, int(mirrored)), self.samples[index][1]

    def name(self, index: int) -> str:
        """Return ``class/file`` of image ``index``, its name in the folder of images."""
        return str(Path(self.samples[index][0]).relative_to(self.root)).removesuffix(".npz")

    def view(self, index: int, which: int) -> Tensor:
        """Return ``moments`` (0) or ``moments_flip`` (1), float32 ``[2C, h, w]``.

        Raises:
            UserError: they cannot be read, or are not of :attr:`shape`.
        """
        path = self.samples[index][0]
        moments = self.read_moments(path, VIEWS[which])
        if self.shape is not None and moments.shape != self.shape:
            shapes = f"{list(moments.shape)}, others {list(self.shape)}"
            raise UserError(
                f"cached moments {path} are {shapes}; regenerate them with main_cache.py"
            )
        return moments

    @staticmethod
    def read_moments(path: str | Path, name: str = "moments") -> Tensor:
        """Return ``moments`` or ``moments_flip`` of one file, float32 ``[C or 2C, h, w]``.

        Raises:
            UserError: the file is damaged, or the values are not finite floats of such a shape.
        """
        try:
            values = read_arrays(path, name)[name]
            if values.dtype.kind != "f" or values.ndim != 3 or not values.size:
                raise UserError(
                    f"{name} is {values.dtype} {list(values.shape)}, not floats [C or 2C, h, w]"
                )
            with np.errstate(over="ignore"):
                moments = torch.from_numpy(values.astype(np.float32))
            if not moments.isfinite().all():
                raise UserError(f"{name} is not finite")
        except UserError as error:
            raise UserError(
                f"cannot read cached moments {path} ({error}); regenerate them with main_cache.py"
            ) from error
        return moments


def read_cache_metadata(root: str | Path) -> dict | None:
    """Return the content of a cache's ``cache.json``; None if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(root) / CACHE_METADATA
    if not path.exists():
        return None
    try:
        metadata = json.loads(path.read_bytes())
        valid = isinstance(metadata, dict) and type(metadata.get("images", 0)) is int
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise UserError(f"{path} is damaged; delete the cache and regenerate it with main_cache.py")
    return metadata


def cache_metadata(root: Path) -> dict[str, Any]:
    """Return the metadata of a cache, packed or not; empty if it has none.

    Raises:
        UserError: the file with the metadata is damaged.
    """
    packed = root / PACKED_METADATA
    return read_json(packed) if packed.exists() else read_cache_metadata(root) or {}
