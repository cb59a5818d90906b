"""Cache the tokenizer's posterior moments of images (torchrun or plain python)."""

import argparse
from pathlib import Path

import util.interpreter  # noqa: F401, before all packages

import torch

from engine_tokenbridge import cache_latents
from models.tokenizer import Tokenizer
from util import distributed, errors
from util.args import (
    DATA_PATH,
    add_column_args,
    add_run_args,
    add_skip_arg,
    add_vae_arg,
    check_positive,
    check_same_flags,
    new_parser,
)
from util.config import follow_tokenizer
from util.data.caches import (
    CACHE_METADATA,
    PACKED_METADATA,
    ImagesToCache,
    collate_present,
    read_cache_metadata,
)
from util.data.datasets import BadImages, image_transform
from util.data.loaders import check_same_inputs, loader_of_all
from util.data.sources import open_images
from util.files import check_shared, remove_parts, write_json
from util.log import log, warn
from util.process_group import process_group
from util.rng import seed_everything


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    add_vae_arg(parser)
    parser.add_argument(
        "--vae_embed_dim",
        type=int,
        default=16,
        help="latent channels; the number in the tokenizer's file takes precedence",
    )
    parser.add_argument(
        "--img_size", type=int, default=256, help="height and width of the images in pixels"
    )
    parser.add_argument("--data_path", default="./data/imagenet", help=DATA_PATH)
    parser.add_argument(
        "--split", choices=["train", "val"], default="train", help="split of --data_path to cache"
    )
    parser.add_argument("--cached_path", default="", help="folder to write <class>/<image>.npz to")
    add_skip_arg(parser)
    add_column_args(parser)
    add_run_args(parser, batch_size=128, seed=0, precision="fp32")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for flags that are missing or out of range."""
    check_positive(args, "img_size", "batch_size")
    if not args.cached_path:
        raise errors.UserError("--cached_path is missing: name the folder to write the cache to")


def read_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """Return the tokenizer; set the flags that its file decides, such as ``--vae_embed_dim``.

    Raises:
        UserError: it cannot be read, or flags do not fit it.
    """
    tokenizer = Tokenizer.from_pretrained(args.vae_path)
    defaults = get_args_parser().parse_args([])
    follow_tokenizer(args, defaults, tokenizer.info)
    return tokenizer


def check_same_cache(cached_path: str | Path, metadata: dict) -> None:
    """Check that this run can complete a cache in ``cached_path``, if it holds moments.

    Args:
        metadata: of the cache to be written.

    Raises:
        UserError: the cache is packed, or has no metadata or other metadata.
    """
    folder = Path(cached_path)
    if (folder / PACKED_METADATA).exists():
        raise errors.UserError(f"{folder} holds a packed cache; choose another folder")
    stored = read_cache_metadata(folder)
    if not any(folder.rglob("*.npz")):  # an earlier run ended before it cached an image
        return
    if stored is None:
        raise errors.UserError(
            f"{folder} holds moments without {CACHE_METADATA}; choose another folder"
        )
    differences = [
        f"{name} is {stored.get(name)} in the cache, {value} in this run"
        for name, value in metadata.items()
        if stored.get(name) != value
    ]
    if differences:
        raise errors.UserError(
            f"{folder} holds another cache ({'; '.join(differences)}); "
            "delete it or choose another folder"
        )


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device, args.deterministic, args.precision) as device:
        check_same_flags(args, device)
        distributed.on_all_ranks(lambda: check_args(args))
        seed_everything(args.seed + distributed.get_rank())
        tokenizer = distributed.on_all_ranks(lambda: read_tokenizer(args))

        # The folder of the cache
        metadata = {
            "img_size": args.img_size,
            "latent_factor": tokenizer.latent_factor,
            "vae": tokenizer.vae.config,
            "vae_sha256": tokenizer.fingerprint,
            "precision": args.precision,
            "split": args.split,
        }
        distributed.on_rank_0(lambda: check_same_cache(args.cached_path, metadata))
        if distributed.is_main_process():
            remove_parts(Path(args.cached_path).rglob(".*.part"))
        check_shared(args.cached_path)

        # The images that are not cached yet
        shape = tokenizer.info.moments_shape(args.img_size)
        bad_images = BadImages(args.cached_path, args.skip_bad_images)

        def open_data() -> ImagesToCache:
            return ImagesToCache(
                open_images(args.data_path, args.split, args.image_column, args.label_column),
                image_transform(args.img_size),
                bad_images=bad_images,
                cached_path=args.cached_path,
                shape=shape,
            )

        dataset = distributed.on_all_ranks(open_data)
        distributed.on_rank_0(dataset.check_others)
        check_same_inputs({args.split: dataset}, tokenizer.vae)
        loader = loader_of_all(dataset, device, args, collate_fn=collate_present)

        # Cache them. Training refuses a cache whose metadata do not say that it is complete
        metadata_path = Path(args.cached_path) / CACHE_METADATA
        if distributed.is_main_process():
            write_json(metadata_path, {"images": len(dataset), **metadata, "complete": False})
        channels_last = {"memory_format": torch.channels_last}
        distributed.on_all_ranks(lambda: tokenizer.to(device, **channels_last))
        written, replaced = cache_latents(
            tokenizer, loader, args.cached_path, device, args.precision
        )
        images = len(dataset) - bad_images.count()
        if distributed.is_main_process():
            write_json(metadata_path, {"images": images, **metadata, "complete": True})
        log.info(
            "cached %d images and mirror images in %s: %d were already cached, %d are new, "
            "%d replaced damaged or outdated files",
            *(images, args.cached_path, images - written, written - replaced, replaced),
        )
        not_compared = sum(distributed.gather_objects(int(dataset.not_compared.sum())))
        if not_compared:
            warn(
                "%d of them could not be compared with the images in %s: their files, written by "
                "MAR or an earlier version, hold no hash. To cache these images again, delete the "
                "files, or choose another --cached_path",
                *(not_compared, dataset.root),
            )


if __name__ == "__main__":
    errors.run(main)
