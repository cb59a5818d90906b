"""Reading cached moments: one file an image against packed caches, with and without worker processes."""

import tempfile
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.common import benchmark_parser, finish, machine, parse, timings
from util.data.caches import CachedFolder
from util.data.packed import DTYPES, PackedCache, pack


def write_cache(root: Path, images: int, side: int = 16) -> None:
    """Writes random moments, ``[32, side, side]``, of ``images`` images in MAR's layout, one file each."""
    random = np.random.RandomState(0)
    for number in range(images):
        path = root / f"{number % 10}" / f"{number:06d}.JPEG.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = random.randn(2, 32, side, side).astype(np.float32)
        np.savez(path, moments=moments[0], moments_flip=moments[1])


def main() -> None:
    """Runs the command line."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--images", type=int, default=4000, help="images in each cache")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2], help="processes that read; 0 for none"
    )
    args = parse(parser)
    hardware, rows = machine(args.device), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_cache(root / "files", args.images)
        caches = {"one file an image": CachedFolder(root / "files")}
        for dtype in DTYPES:
            pack(
                CachedFolder(root / "files"), root / dtype, dtype, shard_images=20000, num_workers=0
            )
            caches[f"packed, {dtype}"] = PackedCache(root / dtype)
        for workers in args.workers:
            works = {}
            for name, cache in caches.items():
                cache.set_draws(0, 0)
                options = {"batch_size": args.batch, "shuffle": True, "num_workers": workers}
                loader = DataLoader(cache, **options, persistent_workers=workers > 0)
                works[name] = lambda loader=loader: [None for _ in loader]
            times = timings(works, args.repeats, args.device)
            slow = times["one file an image"]["median_s"]
            for name, figures in times.items():
                row = {"cache": name, "workers": workers, "images": args.images, **figures}
                row["images_per_s"] = args.images / figures["median_s"]
                rows.append({**row, "ratio": slow / figures["median_s"]})
    finish("loader", rows, hardware, args.json)


if __name__ == "__main__":
    main()
