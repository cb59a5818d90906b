"""Scales the latent channels of a tokenizer unequally; what it reconstructs stays the same (plain python)."""

import argparse
from pathlib import Path

import torch

from models.vae import AutoencoderKL
from util import errors
from util.args import add_vae_arg, check_positive, new_parser
from util.checkpoint.vae_files import save_vae
from util.log import log
from util.process_group import process_group


def scale_channels(vae: AutoencoderKL, scales: torch.Tensor) -> None:
    """Multiplies each channel of the latents by its positive number in ``scales [C]``, and divides it before decoding.

    Means are multiplied in the encoder's last layer, which also moves log variances by twice the scale's logarithm.
    """
    weight, bias, channels = vae.quant_conv.weight.data, vae.quant_conv.bias.data, vae.embed_dim
    weight[:channels] *= scales[:, None, None, None]
    bias[:channels] *= scales
    bias[channels:] += 2 * scales.log()
    vae.post_quant_conv.weight.data /= scales[None, :, None, None]


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    parser = new_parser(__doc__, "experiments.unequal")
    add_vae_arg(parser)
    text = "the largest scale over the smallest; others lie evenly between their logarithms, of mean square 1 together"
    parser.add_argument("--ratio", type=float, default=16.0, help=text)
    parser.add_argument("--output_dir", default="unequal", help="folder to write vae.ckpt to")
    return parser


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with process_group("cpu"):
        check_positive(args, "ratio")
        vae, latent_factor = AutoencoderKL.from_pretrained(args.vae_path)
        if not isinstance(vae, AutoencoderKL):
            raise errors.UserError(
                f"{args.vae_path}: only tokenizers of main_vae.py and KL-16 have channels to scale"
            )
        scales = torch.logspace(0, 1, vae.embed_dim, base=args.ratio)
        scales /= scales.square().mean().sqrt()  # equal channels keep their common deviation
        scale_channels(vae, scales)
        save_vae(Path(args.output_dir) / "vae.ckpt", vae, latent_factor)
        log.info(
            "scales of the channels: %s", ", ".join(f"{scale:.3f}" for scale in scales.tolist())
        )


if __name__ == "__main__":
    errors.run(main)
