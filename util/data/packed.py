"""Packed caches: a few large files mapped into memory, instead of one file per image.

``python -m tools.pack`` converts a cache. A packed cache is a folder with these files:

- ``packed.json``: the content of ``cache.json``, the type and shape of the values, the number of
  images in each shard
- ``names.json``: ``class/file`` of every image
- ``checksums.npy``: the CRC-32 of every view, ``[N, 2]``
- ``shard-NNNNN.npy``: moments of each image and of its mirror image, ``[n, 2, 2C, h, w]``
"""

import zlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from util.data.caches import CACHE_METADATA, PACKED_METADATA, VIEWS, CachedFolder, cached_file
from util.data.datasets import TrainingItems
from util.data.sources import existing_folder
from util.errors import UserError
from util.files import flush_all, read_json, write_json, written_whole
from util.log import progress_bar

#: torch's type and the file's type for each ``--cache_dtype``. NumPy has no bfloat16.
DTYPES = {
    "fp32": (torch.float32, np.float32),
    "fp16": (torch.float16, np.float16),
    "bf16": (torch.bfloat16, np.uint16),
}
SHARD = "shard-{:05d}.npy"

# --------------------------------------------------------------------------------------------------
# Reading


class PackedCache(TrainingItems):
    """A packed cache, with the same items as :class:`util.data.caches.CachedFolder`.

    Attributes:
        metadata, shape: see CachedFolder.
        classes: names of the class folders, sorted. Their positions are the labels.
        samples: ``class/file`` and label of each image.

    Raises:
        UserError: there is no such cache, or it is incomplete or damaged.
    """

    def __init__(self, root: str | Path, mirror: bool = True):
        self.root = existing_folder(root, "cache")
        self.mirror = mirror
        self.metadata = read_json(self.root / PACKED_METADATA)
        names = read_json(self.root / "names.json")
        try:
            self.sizes = [int(size) for size in self.metadata["shards"]]
            self.dtype, self.stored_dtype = DTYPES[self.metadata["dtype"]]
            self.stored = tuple(int(side) for side in self.metadata["shape"])
            self.classes = [str(name) for name in self.metadata["classes"]]
            labels = {name: label for label, name in enumerate(self.classes)}
            self.samples = [(name, labels[name.split("/", 1)[0]]) for name in names]
            self.checksums = np.load(self.root / "checksums.npy", allow_pickle=False)
            count = len(self.samples)
            if sum(self.sizes) != count or self.checksums.shape != (count, 2):
                raise ValueError("its parts are of different lengths")
        except (KeyError, TypeError, ValueError, AttributeError, OSError, EOFError) as error:
            raise UserError(
                f"{self.root} is a damaged packed cache ({error}); pack the cache again"
            ) from error
        self.starts = np.cumsum([0, *self.sizes])
        self.shape: tuple[int, ...] | None = self.stored
        self.shards: list[np.ndarray | None] = [None] * len(self.sizes)
        for number in range(len(self.sizes)):
            self._open(number)

    def __getstate__(self) -> dict:
        # A worker that is not forked opens the shards itself: their content is not pickled.
        return {**self.__dict__, "shards": [None] * len(self.sizes)}

    def _open(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        if shard is None:
            path = self.root / SHARD.format(number)
            expected = (self.sizes[number], 2, *self.stored)
            try:
                shard = np.lib.format.open_memmap(path, mode="r")
                if shard.shape != expected or shard.dtype != self.stored_dtype:
                    raise ValueError(
                        f"{shard.dtype} {list(shard.shape)}, expected {list(expected)}"
                    )
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {path} ({error}); pack the cache again") from error
            self.shards[number] = shard
        return shard

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Return ``class/file`` of image ``index``, its name in the folder of images."""
        return self.samples[index][0]

    def view(self, index: int, which: int) -> Tensor:
        """Return ``moments`` (0) or ``moments_flip`` (1), float32 ``[2C, h, w]``.

        Raises:
            UserError: the checksum is wrong.
        """
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        values = self._open(number)[index - self.starts[number], which]
        if zlib.crc32(values) != self.checksums[index, which]:
            path = self.root / SHARD.format(number)
            raise UserError(f"{path} is damaged at {self.name(index)}; pack the cache again")
        return torch.from_numpy(values.copy()).view(self.dtype).float()

    def read(self, index: int, mirrored: bool = False) -> tuple[Tensor, int]:
        """Return moments and label of item ``index``; UserError if they cannot be read."""
        return self.view(index, int(mirrored)), self.samples[index][1]


def open_cache(root: str | Path, mirror: bool = True) -> CachedFolder | PackedCache:
    """Open the cache in folder ``root``, packed or of one file per image.

    Raises:
        UserError: there is no cache, or it is incomplete or damaged.
    """
    packed = (Path(root) / PACKED_METADATA).exists()
    return PackedCache(root, mirror) if packed else CachedFolder(root, mirror)


# --------------------------------------------------------------------------------------------------
# Conversion


def both_views(cache: CachedFolder | PackedCache, indices: list[int]) -> Tensor:
    """Return the moments of images and of their mirror images, ``[N, 2, 2C, h, w]``."""
    return torch.stack(
        [torch.stack([cache.view(index, 0), cache.view(index, 1)]) for index in indices]
    )


def read_views(cache: CachedFolder | PackedCache, num_workers: int) -> Iterator[Tensor]:
    """Yield both views ``[2, 2C, h, w]`` of each image, in order, with a progress bar."""
    indices: Any = range(len(cache))  # has the interface of a Dataset
    collate = partial(both_views, cache)
    loader = DataLoader(indices, 256, num_workers=num_workers, collate_fn=collate)
    with progress_bar(loader, unit="batch", desc="converting") as batches:
        for batch in batches:
            yield from batch


def pack(
    cache: CachedFolder, root: str | Path, dtype: str, shard_images: int, num_workers: int
) -> None:
    """Convert ``cache`` to a packed cache in ``root``.

    ``packed.json`` is written last, so that an interrupted conversion leaves no valid cache.

    Args:
        cache: the cache.
        root: the folder of the packed cache.
        dtype: a key of :data:`DTYPES`.
        shard_images: images per shard.
        num_workers: worker processes that read ``cache``.

    Raises:
        UserError: a file of ``cache`` is damaged, a value exceeds the range of ``dtype``, or the
            disk is full.
    """
    root = Path(root)
    torch_dtype, numpy_dtype = DTYPES[dtype]
    cache.shape = tuple(cache[0][0].shape)
    (root / PACKED_METADATA).unlink(missing_ok=True)
    sizes = [min(shard_images, len(cache) - start) for start in range(0, len(cache), shard_images)]
    checksums: list[list[int]] = []
    images = read_views(cache, num_workers)
    for number, size in enumerate(sizes):
        with written_whole(root / SHARD.format(number)) as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(numpy_dtype)),
                "fortran_order": False,
                "shape": (size, 2, *cache.shape),
            }
            np.lib.format.write_array_header_2_0(file, header)
            for views in islice(images, size):
                views = views.to(torch_dtype)
                if not views.isfinite().all():
                    raise UserError(
                        f"moments of {cache.root} exceed the range of {dtype}; choose bf16 or fp32"
                    )
                values = (views.view(torch.uint16) if dtype == "bf16" else views).numpy()
                checksums.append([zlib.crc32(view) for view in values])
                file.write(values.tobytes())
    with written_whole(root / "checksums.npy") as file:
        np.save(file, np.array(checksums, dtype=np.uint32))
    write_json(root / "names.json", [cache.name(index) for index in range(len(cache))], indent=None)
    metadata = {
        **cache.metadata,
        "dtype": dtype,
        "shape": list(cache.shape),
        "shards": sizes,
        "classes": cache.classes,
        "images": len(cache),
    }
    write_json(root / PACKED_METADATA, metadata, indent=None)


def unpack(cache: PackedCache, root: str | Path, num_workers: int) -> None:
    """Convert a packed cache to one file per image, float32, with ``cache.json``."""
    packed_only = ("dtype", "shape", "shards", "classes")
    metadata = {name: value for name, value in cache.metadata.items() if name not in packed_only}
    write_json(Path(root) / CACHE_METADATA, {**metadata, "complete": False})
    for index, views in enumerate(read_views(cache, num_workers)):
        with written_whole(cached_file(root, cache.name(index)), flush=False) as file:
            np.savez(file, **dict(zip(VIEWS, views.numpy(), strict=True)))
    flush_all()  # before cache.json marks the cache as complete
    write_json(Path(root) / CACHE_METADATA, {**metadata, "complete": True})
