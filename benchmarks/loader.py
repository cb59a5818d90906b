"""Loading cached moments: one file per image against packed caches, with and without workers."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.common import benchmark_parser, finish, machine, parse_flags, timings
from util.data.caches import CachedFolder
from util.data.packed import DTYPES, PackedCache, pack


def write_cache(root: Path, images: int, side: int = 16) -> None:
    """Write random moments ``[32, side, side]`` in MAR's layout, one file per image."""
    random = np.random.RandomState(0)
    for number in range(images):
        path = root / f"{number % 10}" / f"{number:06d}.JPEG.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = random.randn(2, 32, side, side).astype(np.float32)
        np.savez(path, moments=moments[0], moments_flip=moments[1])


def read_all(loader: DataLoader) -> None:
    """Read one epoch."""
    for _ in loader:
        pass


def main() -> None:
    """Run the command line."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--images", type=int, default=4000, help="images in each cache")
    parser.add_argument("--batch", type=int, default=64, help="batch size")
    text = "numbers of DataLoader workers; 0 reads in the main process"
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help=text)
    args = parse_flags(parser)
    hardware, rows = machine(args.device), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_cache(root / "files", args.images)
        caches: dict[str, CachedFolder | PackedCache] = {
            "one file per image": CachedFolder(root / "files")
        }
        for dtype in DTYPES:
            files = CachedFolder(root / "files")
            pack(files, root / dtype, dtype, shard_images=20000, num_workers=0)
            caches[f"packed, {dtype}"] = PackedCache(root / dtype)
        for workers in args.workers:
            functions = {}
            for name, cache in caches.items():
                cache.set_draws(0, 0)
                options = {"batch_size": args.batch, "shuffle": True, "num_workers": workers}
                loader = DataLoader(cache, **options, persistent_workers=workers > 0)
                functions[name] = partial(read_all, loader)
            times = timings(functions, args.repeats, args.device)
            baseline = times["one file per image"]["median_s"]
            for name, seconds in times.items():
                row = {"cache": name, "workers": workers, "images": args.images, **seconds}
                row["images_per_s"] = args.images / seconds["median_s"]
                rows.append({**row, "ratio": baseline / seconds["median_s"]})
    finish("loader", rows, hardware, args.json)


if __name__ == "__main__":
    main()
