"""Caches in a few big files, mapped into memory: ``python -m tools.pack`` converts a cache of one file an image.

A packed cache is a folder with ``packed.json`` (what ``cache.json`` tells, the type of the values, the images of each
shard), ``names.json`` (``class/file`` of every image, in order), ``checksums.npy`` (CRC-32 of every view, ``[N, 2]``)
and ``shard-NNNNN.npy``, ``[n, 2, 2C, h, w]``: moments of the image and of its mirror image.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from util import misc
from util.errors import UserError
from util.files import inside, read_json, write_json, written_whole
from util.loader import CACHE_METADATA, PACKED_METADATA, CachedFolder, MirrorDraws, existing_folder

#: Values of ``--cache_dtype``, and what NumPy, which has no bfloat16, stores of them.
DTYPES = {
    "fp32": (torch.float32, np.float32),
    "fp16": (torch.float16, np.float16),
    "bf16": (torch.bfloat16, np.uint16),
}
VIEWS = ("moments", "moments_flip")


def shard_path(root: Path, number: int) -> Path:
    """Where shard ``number`` lies."""
    return root / f"shard-{number:05d}.npy"


# --------------------------------------------------------------------------------------------------------------------
# Reading.


class PackedCache(MirrorDraws, Dataset):
    """A packed cache; items are those of :class:`util.loader.CachedFolder`.

    Attributes:
        metadata, shape: as of a CachedFolder.
        classes: names of the class folders, sorted; labels number them.
        samples: ``class/file`` and label of each image.

    Raises:
        UserError: no such cache, an incomplete or a damaged one.
    """

    def __init__(self, root: str | Path, mirror: bool = True):
        self.root, self.mirror = existing_folder(root, "cache"), mirror
        self.metadata = read_json(self.root / PACKED_METADATA)
        names, about = read_json(self.root / "names.json"), self.metadata
        try:
            self.sizes = [int(size) for size in about["shards"]]
            self.dtype = DTYPES[about["dtype"]][0]
            stored = tuple(int(side) for side in about["shape"])
            self.classes = [str(name) for name in about["classes"]]
            labels = {name: label for label, name in enumerate(self.classes)}
            self.samples = [(name, labels[name.split("/", 1)[0]]) for name in names]
            self.checksums = np.load(self.root / "checksums.npy", allow_pickle=False)
            if sum(self.sizes) != len(self.samples) or self.checksums.shape != (len(self.samples), 2):
                raise ValueError("its parts are of different lengths")
        except (KeyError, TypeError, ValueError, AttributeError, OSError, EOFError) as error:
            raise UserError(f"{self.root} is a damaged packed cache ({error}); make it anew") from error
        self.starts = np.cumsum([0, *self.sizes])
        self.stored, self.shape = stored, stored
        self.shards: list[np.ndarray | None] = [None] * len(self.sizes)
        for number in range(len(self.sizes)):
            self._open(number)

    def __getstate__(self) -> dict:
        # A process that is not forked would be sent the whole file.
        return {**self.__dict__, "shards": [None] * len(self.sizes)}

    def _open(self, number: int) -> np.ndarray:
        if self.shards[number] is None:
            path = shard_path(self.root, number)
            expected = (self.sizes[number], 2, *self.stored)
            try:
                shard = np.lib.format.open_memmap(path, mode="r")
                if shard.shape != expected or shard.dtype != DTYPES[self.metadata["dtype"]][1]:
                    raise ValueError(f"{shard.dtype} {list(shard.shape)}, expected {list(expected)}")
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {path} ({error}); pack the cache anew") from error
            self.shards[number] = shard
        return self.shards[number]

    def __len__(self) -> int:
        return len(self.samples)

    def view(self, index: int, which: int) -> Tensor:
        """``moments`` (0) or ``moments_flip`` (1) of image ``index``, float32 ``[2C, h, w]``.

        Raises:
            UserError: its checksum is wrong.
        """
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        values = self._open(number)[index - self.starts[number], which]
        if zlib.crc32(values) != self.checksums[index, which]:
            raise UserError(
                f"{shard_path(self.root, number)} is damaged at {self.samples[index][0]}; pack the cache anew"
            )
        return torch.from_numpy(values.copy()).view(self.dtype).float()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        which = int(self.mirror and self.mirrored(index))
        return self.view(index, which), self.samples[index][1]


def open_cache(root: str | Path, mirror: bool = True) -> CachedFolder | PackedCache:
    """The cache in folder ``root``, packed or of one file an image.

    Raises:
        UserError: there is none, or a damaged one.
    """
    packed = (Path(root) / PACKED_METADATA).exists()
    return PackedCache(root, mirror) if packed else CachedFolder(root, mirror)


# --------------------------------------------------------------------------------------------------------------------
# Converting.


class BothViews(Dataset):
    """Both views of a cache's images, ``[2, 2C, h, w]``."""

    def __init__(self, cache: CachedFolder | PackedCache):
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> Tensor:
        if isinstance(self.cache, PackedCache):
            return torch.stack([self.cache.view(index, which) for which in (0, 1)])
        path = self.cache.samples[index][0]
        return torch.stack([self.cache.checked(self.cache.read_moments(path, name), path) for name in VIEWS])


def name_of(cache: CachedFolder | PackedCache, index: int) -> str:
    """``class/file`` of an image, as the folder of images names it."""
    name = cache.samples[index][0]
    return name if isinstance(cache, PackedCache) else str(Path(name).relative_to(cache.root)).removesuffix(".npz")


def batches(cache: CachedFolder | PackedCache, num_workers: int, size: int) -> Iterator[Tensor]:
    """Both views of all images in order, ``[n, 2, 2C, h, w]``, with a progress bar."""
    loader = DataLoader(BothViews(cache), batch_size=size, num_workers=num_workers)
    with misc.progress(loader, unit="batch", desc="converting") as bar:
        yield from bar


def pack(cache: CachedFolder, root: str | Path, dtype: str, shard_images: int, num_workers: int) -> None:
    """Writes ``cache`` as a packed one to ``root``, its description last: what was only begun is never taken for one.

    Raises:
        UserError: a file of it is damaged, values do not fit the type, or the disk is full.
    """
    root, (torch_dtype, numpy_dtype) = Path(root), DTYPES[dtype]
    cache.shape = tuple(cache[0][0].shape)
    (root / PACKED_METADATA).unlink(missing_ok=True)
    checksums, sizes, pending = [], [], []
    total, source = len(cache), batches(cache, num_workers, 256)
    while sum(sizes) < total:
        size = min(shard_images, total - sum(sizes))
        with written_whole(shard_path(root, len(sizes))) as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(numpy_dtype)), "fortran_order": False}
            np.lib.format.write_array_header_2_0(file, {**header, "shape": (size, 2, *cache.shape)})
            written = 0
            while written < size:
                block = pending.pop() if pending else next(source)
                block, rest = block[: size - written], block[size - written :]
                if len(rest):
                    pending.append(rest)
                values = block.to(torch_dtype)
                if not values.isfinite().all():
                    raise UserError(f"moments of {cache.root} pass the range of {dtype}; choose bf16 or fp32")
                values = values.view(torch.uint16).numpy() if dtype == "bf16" else values.numpy()
                checksums += [[zlib.crc32(view) for view in both] for both in values]
                file.write(values.tobytes())
                written += len(block)
        sizes.append(size)
    with written_whole(root / "checksums.npy") as file:
        np.save(file, np.array(checksums, dtype=np.uint32))
    write_json(root / "names.json", [name_of(cache, index) for index in range(total)], indent=None)
    about = {"dtype": dtype, "shape": list(cache.shape), "shards": sizes, "classes": cache.classes}
    write_json(root / PACKED_METADATA, {**cache.metadata, **about, "images": total}, indent=None)


def unpack(cache: PackedCache, root: str | Path, num_workers: int) -> None:
    """Writes a packed cache as one file an image, float32, with ``cache.json``."""
    own = ("dtype", "shape", "shards", "classes")
    about = {name: value for name, value in cache.metadata.items() if name not in own}
    write_json(Path(root) / CACHE_METADATA, {**about, "complete": False})
    index = 0
    for block in batches(cache, num_workers, 256):
        for both in block.numpy():
            with written_whole(inside(root, f"{name_of(cache, index)}.npz")) as file:
                np.savez(file, **dict(zip(VIEWS, both, strict=True)))
            index += 1
    write_json(Path(root) / CACHE_METADATA, {**about, "complete": True})
