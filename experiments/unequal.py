"""Scale a tokenizer's latent channels unequally without changing reconstructions."""

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
    """Multiply each latent channel by its positive scale ``[C]``, and divide before decoding.

    The encoder's last layer outputs means and log variances. Means are multiplied by the scale, and
    twice its logarithm is added to log variances.
    """
    weight, bias = vae.quant_conv.weight.data, vae.quant_conv.bias.data
    channels = vae.embed_dim
    weight[:channels] *= scales[:, None, None, None]
    bias[:channels] *= scales
    bias[channels:] += 2 * scales.log()
    vae.post_quant_conv.weight.data /= scales[None, :, None, None]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command line of this module."""
    parser = new_parser(__doc__, "experiments.unequal")
    add_vae_arg(parser)
    text = "largest scale over smallest; scales are log-spaced, with a mean square of 1"
    parser.add_argument("--ratio", type=float, default=16.0, help=text)
    parser.add_argument("--output_dir", default="unequal", help="folder to write vae.ckpt to")
    return parser


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group("cpu"):
        check_positive(args, "ratio")
        vae, latent_factor = AutoencoderKL.from_pretrained(args.vae_path)
        if not isinstance(vae, AutoencoderKL):
            raise errors.UserError(
                f"{args.vae_path} is not a tokenizer of main_vae.py or KL-16: "
                "channels of other tokenizers cannot be scaled"
            )
        scales = torch.logspace(0, 1, vae.embed_dim, base=args.ratio)
        scales /= scales.square().mean().sqrt()  # keeps the std over all channels
        scale_channels(vae, scales)
        save_vae(Path(args.output_dir) / "vae.ckpt", vae, latent_factor)
        numbers = ", ".join(f"{scale:.3f}" for scale in scales.tolist())
        log.info("channel scales: %s", numbers)


if __name__ == "__main__":
    errors.run(main)
