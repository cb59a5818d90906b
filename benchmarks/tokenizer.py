"""KL-16 encoding and decoding images: layouts of memory, and cuDNN's choice of kernels by trying them all."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import benchmark_parser, finish, machine, parse, timings
from models.vae import AutoencoderKL
from util.config import KL16_CONFIG
from util.precision import PRECISIONS, autocast


def main() -> None:
    """Runs the command line."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument(
        "--img_size", type=int, default=256, help="height and width of the images in pixels"
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    args = parse(parser)
    hardware, rows = machine(args.device), []
    layouts = {"plain": torch.contiguous_format, "channels last": torch.channels_last}
    models = {
        name: AutoencoderKL(**KL16_CONFIG)
        .eval()
        .requires_grad_(False)
        .to(args.device, memory_format=layout)
        for name, layout in layouts.items()
    }
    images = torch.randn(args.batch, 3, args.img_size, args.img_size, device=args.device)
    latents = torch.randn(
        args.batch, 16, args.img_size // 16, args.img_size // 16, device=args.device
    )

    def way(
        precision: str, tries: bool, work: Callable[[Tensor], object], given: Tensor
    ) -> Callable[[], None]:
        def run() -> None:
            torch.backends.cudnn.benchmark = tries
            with autocast(args.device, precision):
                work(given)

        return run

    for precision in args.precision:
        for task, given in (("encode", images), ("decode", latents)):
            works = {
                (name, tries): way(precision, tries, getattr(model, task), given)
                for name, model in models.items()
                for tries in (False, True)[: 1 + (args.device.type == "cuda")]
            }
            times = timings(works, args.repeats, args.device)
            for (layout, tries), figures in times.items():
                row = {"task": task, "precision": precision, "batch": args.batch, "layout": layout}
                row |= {"cudnn.benchmark": str(tries), **figures}
                row["images_per_s"] = args.batch / figures["median_s"]
                rows.append(
                    {**row, "ratio": times["plain", False]["median_s"] / figures["median_s"]}
                )
    finish("tokenizer", rows, hardware, args.json)


if __name__ == "__main__":
    main()
