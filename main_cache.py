"""Precomputes the tokenizer's posterior moments of a folder of images (torchrun or plain python)."""

import argparse
from pathlib import Path

from engine_tokenbridge import cache_latents
from models.vae import AutoencoderKL
from util import errors, misc
from util.args import add_run_args, add_vae_arg, check_positive, new_parser
from util.files import write_json
from util.loader import CACHE_METADATA, ImageFolderWithFilename, Share, image_transform, make_loader


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)
    add_vae_arg(parser)
    parser.add_argument("--vae_embed_dim", type=int, default=16, help="latent channels; a file that tells its own wins")
    parser.add_argument("--img_size", type=int, default=256, help="height and width of the images in pixels")
    parser.add_argument("--data_path", default="./data/imagenet", help="folder of train/<class>/<image>, val/ likewise")
    parser.add_argument("--split", choices=["train", "val"], default="train", help="which folder of --data_path")
    parser.add_argument("--cached_path", default="", help="folder to write <class>/<image>.npz to")
    add_run_args(parser, batch_size=128, seed=0, precision="fp32")
    return parser


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with misc.processes(args.device) as device:
        check_positive(args, "img_size", "batch_size")
        if not args.cached_path:
            raise errors.UserError("--cached_path is missing: name the folder to write the cache to")
        misc.seed_everything(args.seed + misc.get_rank())
        dataset = ImageFolderWithFilename(Path(args.data_path) / args.split, image_transform(args.img_size))
        vae, latent_factor = AutoencoderKL.from_pretrained(args.vae_path)
        misc.check_told("vae_embed_dim", args.vae_embed_dim, 16, vae.embed_dim, args.vae_path)
        misc.check_stride(args.img_size, vae.stride)
        loader = make_loader(dataset, args, device, sampler=Share(len(dataset), misc.get_rank(), misc.get_world_size()))
        about = {"images": len(dataset), "img_size": args.img_size, "latent_factor": latent_factor, "vae": vae.config}

        def describe(complete: bool) -> None:
            if misc.is_main_process():
                write_json(Path(args.cached_path) / CACHE_METADATA, {**about, "complete": complete})

        describe(complete=False)  # training refuses a cache whose run stopped half-way
        cache_latents(vae.to(device), loader, args.cached_path, device, args.precision)
        describe(complete=True)
        misc.log.info("cached %d images and their mirror images in %s", len(dataset), args.cached_path)


if __name__ == "__main__":
    errors.run(main)
