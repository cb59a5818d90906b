"""Encoding and decoding with a tokenizer: memory formats, and cudnn.benchmark on CUDA."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import benchmark_parser, finish, machine, parse_flags, timings
from models.tokenizer import Tokenizer
from models.vae import AutoencoderKL
from util.config import KL16_CONFIG
from util.precision import PRECISIONS, autocast


def main() -> None:
    """Run the command line."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--batch", type=int, default=1, help="batch size")
    text = "height and width of the images in pixels"
    parser.add_argument("--img_size", type=int, default=256, help=text)
    precisions = ["fp32", "bf16"]
    text = "precisions to measure"
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=precisions, help=text)
    text = "tokenizer to measure; by default KL-16 with random weights"
    parser.add_argument("--vae_path", default="", help=text)
    args = parse_flags(parser)
    hardware, rows = machine(args.device), []
    layouts = {"plain": torch.contiguous_format, "channels last": torch.channels_last}
    config: dict[str, Any] = KL16_CONFIG
    models = {}
    for layout, memory_format in layouts.items():
        if args.vae_path:
            vae = Tokenizer.from_pretrained(args.vae_path).vae
        else:
            vae = AutoencoderKL(**config).eval().requires_grad_(False)
        models[layout] = vae.to(args.device).to(memory_format=memory_format)
    side = args.img_size // vae.stride
    images = torch.randn(args.batch, 3, args.img_size, args.img_size, device=args.device)
    latents = torch.randn(args.batch, vae.embed_dim, side, side, device=args.device)

    def run(precision: str, cudnn_benchmark: bool, work: Callable, batch: Tensor) -> None:
        torch.backends.cudnn.benchmark = cudnn_benchmark
        with autocast(args.device, precision):
            work(batch)

    for precision in args.precision:
        for task, batch in (("encode", images), ("decode", latents)):
            functions = {
                (layout, cudnn_benchmark): partial(
                    run, precision, cudnn_benchmark, getattr(model, task), batch
                )
                for layout, model in models.items()
                for cudnn_benchmark in ([False, True] if args.device.type == "cuda" else [False])
            }
            times = timings(functions, args.repeats, args.device)
            baseline = times["plain", False]["median_s"]
            for (layout, cudnn_benchmark), seconds in times.items():
                row = {"task": task, "precision": precision, "batch": args.batch, "layout": layout}
                row |= {"cudnn.benchmark": str(cudnn_benchmark), **seconds}
                row["images_per_s"] = args.batch / seconds["median_s"]
                rows.append({**row, "ratio": baseline / seconds["median_s"]})
    finish("tokenizer", rows, hardware, args.json)


if __name__ == "__main__":
    main()
