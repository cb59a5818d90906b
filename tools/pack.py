"""Convert a cache with one file per image to a packed cache, or back."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from util import errors
from util.args import WORKERS, check_positive, check_range, new_parser
from util.data.caches import CACHE_METADATA, PACKED_METADATA
from util.data.packed import DTYPES, PackedCache, open_cache, pack, unpack
from util.errors import UserError
from util.log import log
from util.process_group import process_group


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__, "tools.pack")
    parser.add_argument("--cached_path", default="", help="folder of the cache to convert")
    parser.add_argument("--output_dir", default="", help="folder to write the converted cache to")
    parser.add_argument(
        "--cache_dtype", choices=DTYPES, default="fp32", help="type of the packed values"
    )
    parser.add_argument(
        "--shard_images", type=int, default=20000, help="images in each file of the packed cache"
    )
    parser.add_argument(
        "--num_workers", type=int, default=WORKERS, help="processes that read the cache"
    )
    parser.add_argument(
        "--unpack", action="store_true", help="convert a packed cache to one file per image"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = get_args_parser().parse_args(argv)
    with process_group("cpu"):
        check_positive(args, "shard_images")
        check_range(args, 0, math.inf, "num_workers")
        if not args.cached_path or not args.output_dir:
            raise UserError(
                "--cached_path and --output_dir are needed: "
                "name the cache to read and the folder to write to"
            )
        cache = open_cache(args.cached_path, mirror=False)
        is_packed = isinstance(cache, PackedCache)
        if args.unpack and not is_packed:
            raise UserError(f"{args.cached_path} is not packed: remove --unpack")
        if is_packed and not args.unpack:
            raise UserError(f"{args.cached_path} is packed already: add --unpack to unpack it")
        for name in (PACKED_METADATA, CACHE_METADATA):
            if (Path(args.output_dir) / name).exists():
                raise UserError(
                    f"{args.output_dir} holds a cache already ({name}); choose another folder"
                )
        if isinstance(cache, PackedCache):
            unpack(cache, args.output_dir, args.num_workers)
        else:
            pack(cache, args.output_dir, args.cache_dtype, args.shard_images, args.num_workers)
        log.info("wrote %d images to %s", len(cache), args.output_dir)


if __name__ == "__main__":
    errors.run(main)
