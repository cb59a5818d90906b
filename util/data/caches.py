"""Data sets of cached moments, and of the images that a cache lacks."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    Dataset,
    default_collate,
)

from util.data.datasets import ImageFolder, TrainingItems
from util.data.sources import (
    Folder,
    Rows,
    existing_folder,
    find_class_folders,
)
from util.errors import UserError, some
from util.files import inside, read_arrays, read_json

#: The description of a cache, and of a packed one: tokenizer, image size, number of images.
CACHE_METADATA, PACKED_METADATA = "cache.json", "packed.json"


#: What a cache holds of each image: moments of itself, and of its mirror image.
VIEWS = ("moments", "moments_flip")


#: And the SHA-256 of the image's file, uint8 ``[32]``; caches of MAR and of earlier versions have none.
IMAGE_HASH = "image_sha256"


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
        raise UserError(
            f"cannot read image {content} ({error.strerror}); replace or remove it"
        ) from error
    return np.frombuffer(
        hashlib.sha256(data).digest(), np.uint8
    ).copy()  # writable, as torch wants it


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
            if not path.exists() or any(
                CachedFolder.read_moments(path, view).shape != self.shape for view in VIEWS
            ):
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


class CachedFolder(TrainingItems, Dataset):
    """``root/<class>/<image name>.npz`` with ``moments`` and ``moments_flip``, as main_cache.py and MAR write them.

    Items are moments ``[2C, h, w]`` (``[C, h, w]`` if the tokenizer is deterministic), float32, not scaled, and the
    label; with ``mirror`` the moments are those of the
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
            raise UserError(
                f"{where} holds no cached moments (<class>/<file>.npz); make them with main_cache.py"
            )
        self.classes = list(found)
        self.samples = [(path, label) for label, name in enumerate(found) for path in found[name]]
        self.shape: tuple[int, ...] | None = None
        self.metadata = read_cache_metadata(self.root) or {}
        planned = self.metadata.get("images", len(self.samples))
        if len(self.samples) < planned or not self.metadata.get("complete", True):
            raise UserError(
                f"{root} is incomplete: {len(self.samples)} of {planned} files; run main_cache.py again"
            )
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
                f"cannot read cached moments {path} ({error}); renew them with main_cache.py"
            ) from error
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


def cache_metadata(root: Path) -> dict[str, Any]:
    """What a cache, packed or not, holds about its tokenizer and images; empty if nothing.

    Raises:
        UserError: the file that holds it is damaged.
    """
    packed = root / PACKED_METADATA
    return read_json(packed) if packed.exists() else read_cache_metadata(root) or {}
