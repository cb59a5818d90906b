"""Caches in a few big files, mapped into memory: ``python -m tools.pack`` converts a cache of one file an image.

A packed cache is a folder with ``packed.json`` (the content of ``cache.json``, the type of the values, the number of
images in each shard), ``names.json`` (``class/file`` of every image), ``checksums.npy`` (CRC-32 of every view,
``[N, 2]``) and ``shard-NNNNN.npy``, ``[n, 2, 2C, h, w]``: moments of each image and of its mirror image.
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
from torch.utils.data import DataLoader, Dataset

from util.data.caches import CACHE_METADATA, PACKED_METADATA, VIEWS, CachedFolder, cached_file
from util.data.datasets import TrainingItems
from util.data.sources import existing_folder
from util.errors import UserError
from util.files import flush_all, read_json, write_json, written_whole
from util.log import progress_bar

#: Values of ``--cache_dtype``: torch's type, and the type of the file, since NumPy has no bfloat16.
DTYPES = {
    "fp32": (torch.float32, np.float32),
    "fp16": (torch.float16, np.float16),
    "bf16": (torch.bfloat16, np.uint16),
}
SHARD = "shard-{:05d}.npy"

# --------------------------------------------------------------------------------------------------------------------
# Reading.


class PackedCache(TrainingItems, Dataset):
    """A packed cache; items are those of :class:`util.data.caches.CachedFolder`.

    Attributes:
        metadata, shape: as of a CachedFolder.
        classes: names of the class folders, sorted; labels number them.
        samples: ``class/file`` and label of each image.

    Raises:
        UserError: there is no such cache, or it is incomplete or damaged.
    """

    def __init__(self, root: str | Path, mirror: bool = True):
        self.root, self.mirror = existing_folder(root, "cache"), mirror
        self.metadata = read_json(self.root / PACKED_METADATA)
        names, metadata = read_json(self.root / "names.json"), self.metadata
        try:
            self.sizes = [int(size) for size in metadata["shards"]]
            self.dtype, self.stored_dtype = DTYPES[metadata["dtype"]]
            stored = tuple(int(side) for side in metadata["shape"])
            self.classes = [str(name) for name in metadata["classes"]]
            labels = {name: label for label, name in enumerate(self.classes)}
            self.samples = [(name, labels[name.split("/", 1)[0]]) for name in names]
            self.checksums = np.load(self.root / "checksums.npy", allow_pickle=False)
            if sum(self.sizes) != len(self.samples) or self.checksums.shape != (
                len(self.samples),
                2,
            ):
                raise ValueError("its parts are of different lengths")
        except (KeyError, TypeError, ValueError, AttributeError, OSError, EOFError) as error:
            raise UserError(
                f"{self.root} is a damaged packed cache ({error}); make it anew"
            ) from error
        self.starts = np.cumsum([0, *self.sizes])
        self.stored, self.shape = stored, stored
        self.shards: list[np.ndarray | None] = [None] * len(self.sizes)
        for number in range(len(self.sizes)):
            self._open(number)

    def __getstate__(self) -> dict:
        # A worker process that is not forked opens the shards itself, instead of being sent their content.
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
                raise UserError(f"cannot read {path} ({error}); pack the cache anew") from error
            self.shards[number] = shard
        return shard

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """``class/file`` of image ``index``, as the folder of images names it."""
        return self.samples[index][0]

    def view(self, index: int, which: int) -> Tensor:
        """``moments`` (0) or ``moments_flip`` (1), float32 ``[2C, h, w]``; UserError if the checksum is wrong."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        values = self._open(number)[index - self.starts[number], which]
        if zlib.crc32(values) != self.checksums[index, which]:
            path = self.root / SHARD.format(number)
            raise UserError(f"{path} is damaged at {self.name(index)}; pack the cache anew")
        return torch.from_numpy(values.copy()).view(self.dtype).float()

    def read(self, index: int, mirrored: bool = False) -> tuple[Tensor, int]:
        """Moments and label of item ``index``; UserError if they cannot be read."""
        return self.view(index, int(mirrored)), self.samples[index][1]


def open_cache(root: str | Path, mirror: bool = True) -> CachedFolder | PackedCache:
    """The cache in folder ``root``, packed or of one file an image; UserError if there is none or it is damaged."""
    packed = (Path(root) / PACKED_METADATA).exists()
    return PackedCache(root, mirror) if packed else CachedFolder(root, mirror)


# --------------------------------------------------------------------------------------------------------------------
# Converting.


def both_views(cache: CachedFolder | PackedCache, indices: list[int]) -> Tensor:
    """Moments of images and of their mirror images, ``[N, 2, 2C, h, w]``."""
    return torch.stack(
        [torch.stack([cache.view(index, which) for which in (0, 1)]) for index in indices]
    )


def read_all(cache: CachedFolder | PackedCache, num_workers: int) -> Iterator[Tensor]:
    """Both views, ``[2, 2C, h, w]``, of one image after the other, with a progress bar."""
    numbers: Any = range(len(cache))  # as good as a Dataset
    loader = DataLoader(
        numbers, 256, num_workers=num_workers, collate_fn=partial(both_views, cache)
    )
    with progress_bar(loader, unit="batch", desc="converting") as batches:
        for batch in batches:
            yield from batch


def pack(
    cache: CachedFolder, root: str | Path, dtype: str, shard_images: int, num_workers: int
) -> None:
    """Writes ``cache`` as a packed one to ``root``.

    ``packed.json`` is written last, so that a folder whose packing was interrupted is not taken for a cache.

    Raises:
        UserError: a file of ``cache`` is damaged, values exceed the type's range, or the disk is full.
    """
    root, (torch_dtype, numpy_dtype) = Path(root), DTYPES[dtype]
    cache.shape = tuple(cache[0][0].shape)
    (root / PACKED_METADATA).unlink(missing_ok=True)
    sizes = [min(shard_images, len(cache) - start) for start in range(0, len(cache), shard_images)]
    checksums, images = [], read_all(cache, num_workers)
    for number, size in enumerate(sizes):
        with written_whole(root / SHARD.format(number)) as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(numpy_dtype)),
                "fortran_order": False,
            }
            np.lib.format.write_array_header_2_0(file, {**header, "shape": (size, 2, *cache.shape)})
            for views in islice(images, size):
                views = views.to(torch_dtype)
                if not views.isfinite().all():
                    raise UserError(
                        f"moments of {cache.root} pass the range of {dtype}; choose bf16 or fp32"
                    )
                values = (views.view(torch.uint16) if dtype == "bf16" else views).numpy()
                checksums.append([zlib.crc32(view) for view in values])
                file.write(values.tobytes())
    with written_whole(root / "checksums.npy") as file:
        np.save(file, np.array(checksums, dtype=np.uint32))
    write_json(root / "names.json", [cache.name(index) for index in range(len(cache))], indent=None)
    metadata = {
        "dtype": dtype,
        "shape": list(cache.shape),
        "shards": sizes,
        "classes": cache.classes,
    }
    write_json(
        root / PACKED_METADATA, {**cache.metadata, **metadata, "images": len(cache)}, indent=None
    )


def unpack(cache: PackedCache, root: str | Path, num_workers: int) -> None:
    """Writes a packed cache as one file an image, float32, with ``cache.json``."""
    own = ("dtype", "shape", "shards", "classes")
    metadata = {name: value for name, value in cache.metadata.items() if name not in own}
    write_json(Path(root) / CACHE_METADATA, {**metadata, "complete": False})
    for index, views in enumerate(read_all(cache, num_workers)):
        with written_whole(cached_file(root, cache.name(index)), flush=False) as file:
            np.savez(file, **dict(zip(VIEWS, views.numpy(), strict=True)))
    flush_all()  # before the cache is called complete
    write_json(Path(root) / CACHE_METADATA, {**metadata, "complete": True})
