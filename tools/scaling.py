"""Estimate time and storage of training on many GPUs, without a GPU: docs/scaling.md.

They follow from the operations and bytes of the models. Flags set the assumptions.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import inception_v3

from models.sampling import SamplingOptions, sampling_plan
from models.tokenbridge import MODELS, TokenBridge
from models.vae import AutoencoderKL
from util import errors
from util.args import new_parser
from util.config import KL16_CONFIG
from util.files import read_json
from util.log import duration
from util.tables import fill, markdown, write_text

ROOT = Path(__file__).resolve().parent.parent

# --------------------------------------------------------------------------------------------------
# Assumptions


class Gpu(NamedTuple):
    """Peak rates of a GPU and of its InfiniBand port, from NVIDIA's data sheets."""

    bf16: float  # operations per second, dense
    tf32: float
    fp32: float
    nvlink: float  # bytes per second, one way
    port: float


GPUS = {  # H200 differs from H100 in its memory only
    "A100": Gpu(312e12, 156e12, 19.5e12, 300e9, 25e9),
    "H100, H200": Gpu(989e12, 494.5e12, 67e12, 450e9, 50e9),
}
GPU_COUNTS = (8, 32, 256)
EPOCHS = (400, 800)
#: Images of an FID, and of a reconstruction FID.
FID_IMAGES = 50_000
#: Sampling settings of FID-50K: those of the paper, and cheaper ones (docs/evaluation.md).
SETTINGS = {
    "256 steps": SamplingOptions(256, cfg=3.0),
    "64 steps": SamplingOptions(64, cfg=3.0),
}
#: Flags: name, default and meaning.
ASSUMED = {
    "utilization": (0.4, "fraction of the peak that matrix products reach, averaged over a step"),
    "batch": (2048, "global batch size"),
    "images": (1281167, "training images (ImageNet)"),
    "node": (8, "GPUs per machine, connected by NVLink"),
    "ports": (8, "InfiniBand ports per machine"),
    "decoded": (100.0, "images per second that one worker decodes and crops"),
    "disk": (1.0, "write speed for checkpoints, GB/s"),
    "save_last_freq": (5, "epochs between two checkpoints"),
    "launch": (5.0, "time to launch one operation, microseconds"),
    "launches": (35, "operations per transformer block"),
    "eval_bsz": (256, "images sampled at once per GPU"),
}


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__, "tools.scaling")
    for name, (default, meaning) in ASSUMED.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=meaning)
    parser.add_argument(
        "--write", action="store_true", help="write the tables into docs/ and README.md"
    )
    return parser


# --------------------------------------------------------------------------------------------------
# Counts


@torch.no_grad()
def count_flops(function: Callable, *shape: int) -> float:
    """Return the operations of ``function`` on a tensor of this shape.

    Only matrix products and convolutions are counted.
    """
    with FlopCounterMode(display=False) as counter:
        function(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


class Counts(NamedTuple):
    """Models on the meta device, and the operations of the VAE and Inception on one image."""

    models: dict[str, TokenBridge]
    encode: float
    decode: float
    inception: float

    @classmethod
    def make(cls) -> "Counts":
        """Build the models and count operations; takes seconds."""
        vae_config: dict[str, Any] = dict(KL16_CONFIG)
        with torch.device("meta"):
            models = {
                name: MODELS[f"tokenbridge_{name}"](quant_levels=64).eval()
                for name in ("large", "huge")
            }
            vae = AutoencoderKL(**vae_config).eval()
            inception = inception_v3(init_weights=False).eval()
        return cls(
            models,
            encode=count_flops(vae.encode, 1, 3, 256, 256),
            decode=count_flops(vae.decode, 1, 16, 16, 16),
            inception=count_flops(inception, 1, 3, 299, 299),
        )


def count_parameters(model: TokenBridge) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------
# Estimates


def seconds_per_image(
    flops: float, gpu: Gpu, assumed: argparse.Namespace, encode: float = 0.0
) -> float:
    """Return the seconds per training image on one GPU.

    Args:
        flops: of the training step per image, in bf16.
        encode: operations of the VAE's encoder per image, in fp32, whose convolutions run in TF32.
    """
    return (flops / gpu.bf16 + encode / gpu.tf32) / assumed.utilization


def backward_seconds(
    model: TokenBridge, gpu: Gpu, assumed: argparse.Namespace, images: float
) -> float:
    """Return the seconds of the backbone's backward pass over ``images`` on one GPU.

    Gradients are exchanged meanwhile. The head's are computed in the forward pass, by the loss in
    parts (:mod:`models.fast`), but autograd hands them over only when the backward pass starts.
    """
    flops = 2 * model.backbone.flops(model.expected_masked())  # twice the forward pass
    return images * seconds_per_image(flops, gpu, assumed)


def gpu_hours(
    flops: float, gpu: Gpu, assumed: argparse.Namespace, epochs: int, encode: float = 0.0
) -> float:
    """Return the GPU-hours of training for ``epochs``; see :func:`seconds_per_image`."""
    return epochs * assumed.images * seconds_per_image(flops, gpu, assumed, encode) / 3600


def all_reduce_seconds(
    size: float, count: int, gpu: Gpu, assumed: argparse.Namespace, ports: int
) -> float:
    """Return the seconds of an all-reduce of ``size`` bytes in a ring of ``count`` GPUs.

    Each link of a ring of n GPUs carries 2 (n - 1) / n times the bytes. The slowest link decides.

    Args:
        ports: InfiniBand ports per machine.
    """
    rate = gpu.nvlink if count <= assumed.node else min(gpu.nvlink, ports * gpu.port)
    return 2 * (count - 1) / count * size / rate


def launches(model: TokenBridge, assumed: argparse.Namespace) -> tuple[int, int]:
    """Return the kernel launches of one sampling step in the backbone and in the head.

    The blocks of the head run once per channel step.
    """
    backbone = model.config["encoder_depth"] + model.config["decoder_depth"]
    return (
        assumed.launches * backbone,
        assumed.launches * model.head.depth * model.head.channel_steps,
    )


def sampling_seconds(
    model: TokenBridge, options: SamplingOptions, gpu: Gpu, assumed: argparse.Namespace
) -> tuple[float, float]:
    """Return the seconds that backbone and head take to sample a batch.

    Each step takes the time of its operations, or of their launches if that is longer.
    """
    rate = gpu.bf16 * assumed.utilization / assumed.eval_bsz
    backbone = 0.0
    head = 0.0
    waits = [1e-6 * assumed.launch * count for count in launches(model, assumed)]
    for step in sampling_plan(options, model.seq_len):
        halves = 1 + step.both_halves  # guidance doubles the batch
        backbone += max(halves * model.backbone.flops(step.masked) / rate, waits[0])
        head += max((step.masked - step.left) * model.head.sampling_flops() / rate, waits[1])
    return backbone, head


def fid_seconds(
    counts: Counts,
    model: TokenBridge,
    options: SamplingOptions,
    gpu: Gpu,
    count: int,
    assumed: argparse.Namespace,
) -> list[float]:
    """Return the seconds of FID-50K on ``count`` GPUs: backbone, head, VAE, Inception."""
    batches = math.ceil(math.ceil(FID_IMAGES / assumed.eval_bsz) / count)  # of one GPU
    parts = [batches * part for part in sampling_seconds(model, options, gpu, assumed)]
    for flops, peak in ((counts.decode, gpu.bf16), (counts.inception, gpu.fp32)):
        parts.append(FID_IMAGES * flops / peak / assumed.utilization / count)
    return parts


# --------------------------------------------------------------------------------------------------
# Tables of the pages. Comments in a page mark their places by the names of the functions.


def operations(counts: Counts, assumed: argparse.Namespace) -> str:
    """Return the table of operations per image and per training."""
    rows = []
    for name, model in counts.models.items():
        flops = model.training_flops()
        totals = [epochs * assumed.images * flops / 1e18 for epochs in EPOCHS]
        size = f"{count_parameters(model) / 1e6:.1f}M"
        rows.append([name, size, flops / 1e12, counts.encode / 1e12, *totals])
    header = ["model", "parameters", "training, per image", "VAE, per image"]
    return markdown([*header, *(f"{epochs} epochs (10^18)" for epochs in EPOCHS)], rows)


def hours(counts: Counts, assumed: argparse.Namespace) -> str:
    """Return the table of GPU-hours and hours of training."""
    rows = []
    for name, model in counts.models.items():
        for epochs in EPOCHS:
            for data, encode in (("cached", 0.0), ("images", counts.encode)):
                for kind, gpu in GPUS.items():
                    total = gpu_hours(model.training_flops(), gpu, assumed, epochs, encode)
                    times = [f"{total / count:,.1f}" for count in GPU_COUNTS]
                    rows.append([name, epochs, data, kind, f"{total:,.0f}", *times])
    header = ["model", "epochs", "data", "GPU", "GPU-hours"]
    return markdown([*header, *(f"hours on {count}" for count in GPU_COUNTS)], rows)


def communication(counts: Counts, assumed: argparse.Namespace) -> str:
    """Return the table of the backbone's backward passes and all-reduces of gradients."""
    rows = []
    for name, model in counts.models.items():
        size = 4 * count_parameters(model)  # float32
        for kind, gpu in GPUS.items():
            for count in GPU_COUNTS:
                images = assumed.batch / count
                backward = backward_seconds(model, gpu, assumed, images)
                cells: list[str | None] = []
                for ports in (assumed.ports, 1):
                    seconds = all_reduce_seconds(size, count, gpu, assumed, ports)
                    cells.append(f"{1e3 * seconds:.1f} ms, {seconds / backward:.1%}")
                if count <= assumed.node:  # no port is used
                    cells[1] = None
                row = [name, f"{size / 2**30:.2f} GiB", kind, count, f"{images:g}"]
                rows.append([*row, f"{1e3 * backward:,.0f} ms", *cells])
    header = ["model", "gradients", "GPU", "GPUs", "images per GPU", "backbone's backward pass"]
    return markdown([*header, "all-reduce", "with one port"], rows)


def binding(counts: Counts, assumed: argparse.Namespace) -> str:
    """Return the table of the GPUs at which the exchange takes as long as it may stay hidden."""
    rows = []
    for name, model in counts.models.items():
        for kind, gpu in GPUS.items():
            backward = backward_seconds(model, gpu, assumed, assumed.batch)  # on one GPU
            cells = []
            for ports in (assumed.ports, 1):
                bandwidth = min(gpu.nvlink, ports * gpu.port)
                rate = bandwidth / (2 * 4 * count_parameters(model))
                cells.append(f"{backward * rate:,.0f}")
            rows.append([name, kind, *cells])
    return markdown(["model", "GPU", "limit, GPUs", "with one port"], rows)


def loading(counts: Counts, assumed: argparse.Namespace) -> str:
    """Return the table of data rates that training needs."""
    results = read_json(ROOT / "benchmarks" / "results" / "cpu-loader.json")["rows"]
    measured = {row["cache"]: row["images_per_s"] for row in results if row["workers"] == 0}
    rows = []
    for name, model in counts.models.items():
        flops = model.training_flops()
        for kind, gpu in GPUS.items():
            rate = 1 / seconds_per_image(flops, gpu, assumed)
            caches = ("one file per image", "packed, fp32")
            readers = [f"{measured[cache] / rate:,.0f}" for cache in caches]
            read = f"{GPU_COUNTS[-1] * rate * 2**15 / 1e9:.2f} GB/s"
            # Training on images also encodes them
            workers = 1 / seconds_per_image(flops, gpu, assumed, counts.encode) / assumed.decoded
            rows.append([name, kind, f"{rate:.0f}", *readers, read, f"{workers:.1f}"])
    header = ["model", "GPU", "images/s per GPU", "GPUs per reader: files", "packed"]
    header += [f"read rate, {GPU_COUNTS[-1]} GPUs", "from images: workers per GPU"]
    return markdown(header, rows)


def files(counts: Counts, assumed: argparse.Namespace) -> str:
    """Return the table of sizes of caches and checkpoints, and of the time to write them."""
    # Two views of an image; mean and log-variance of 16 channels at 16 x 16 positions
    values = 2 * 2 * 16 * 16 * 16
    rows: list[list] = []
    for dtype, size in (("fp32", 4), ("fp16, bf16", 2)):
        gib = assumed.images * values * size / 2**30
        rows.append([f"cache, {dtype}", gib, None, *[None] * len(GPU_COUNTS)])
    gpu = GPUS["H100, H200"]
    for name, model in counts.models.items():
        # Weights, EMA, and two tensors of optimizer state, in fp32
        size = 16 * count_parameters(model)
        seconds = size / (1e9 * assumed.disk)
        between = gpu_hours(model.training_flops(), gpu, assumed, assumed.save_last_freq) * 3600
        shares = [f"{seconds / (between / count):.1%}" for count in GPU_COUNTS]
        rows.append([f"checkpoint, {name}", size / 2**30, f"{seconds:.1f} s", *shares])
    header = ["file", "GiB", "time to write"]
    return markdown([*header, *(f"share of training, {n} H100" for n in GPU_COUNTS)], rows)


def fid(counts: Counts, assumed: argparse.Namespace) -> str:
    """Return the table of minutes to measure FID on one machine."""
    rows = []
    for name, model in counts.models.items():
        for setting, options in SETTINGS.items():
            for kind, gpu in GPUS.items():
                parts = fid_seconds(counts, model, options, gpu, assumed.node, assumed)
                minutes = [f"{seconds / 60:.1f}" for seconds in (*parts, sum(parts))]
                launched = " + ".join(f"{count:,}" for count in launches(model, assumed))
                rows.append([name, setting, kind, launched, *minutes])
    parts = ["backbone", "head", "VAE", "Inception"]
    return markdown(["model", "setting", "GPU", "launches per step", *parts, "total"], rows)


def reproduction(counts: Counts, assumed: argparse.Namespace) -> str:
    """Return the table of the time of each step of docs/reproduce.md."""
    works = {  # operations in fp32: without TF32, as the commands compute
        "caching ImageNet with mirror images": 2 * assumed.images * counts.encode,
        "rFID of 50,000 images": FID_IMAGES
        * (counts.encode + counts.decode + 2 * counts.inception),
    }
    named = [(kind, count) for kind in GPUS for count in GPU_COUNTS[:2]]
    machines = [(GPUS[kind], count) for kind, count in named]
    rows = [
        [name, *(flops / gpu.fp32 / assumed.utilization / count for gpu, count in machines)]
        for name, flops in works.items()
    ]
    for name, model in counts.models.items():
        for setting, options in SETTINGS.items():
            times = [
                sum(fid_seconds(counts, model, options, gpu, count, assumed))
                for gpu, count in machines
            ]
            rows.append([f"FID-50K of {name}, {setting}", *times])
    for name, model in counts.models.items():
        for epochs in EPOCHS:
            flops = model.training_flops()
            times = [
                3600 * gpu_hours(flops, gpu, assumed, epochs) / count for gpu, count in machines
            ]
            rows.append([f"training {name}, {epochs} epochs, cached latents", *times])
    header = ["step", *(f"{count} {kind.split(',')[0]}s" for kind, count in named)]
    return markdown(header, [[name, *map(duration, times)] for name, *times in rows])


TABLES = (operations, hours, communication, binding, loading, files, fid, reproduction)

# --------------------------------------------------------------------------------------------------
# Pages


def quoted_numbers(counts: Counts, assumed: argparse.Namespace) -> dict[str, str]:
    """Return the numbers in running text, by the names that mark their places in the pages."""
    results = ROOT / "benchmarks" / "results"
    cpu = read_json(results / "cpu-training.json")
    cuda = read_json(results / "cuda-training.json")
    cpu_utilization = {row["way"]: row["utilization"] for row in cpu["rows"]}
    cuda_utilization = {row["way"]: row["utilization"] for row in cuda["rows"]}
    large = counts.models["large"]
    a100, h100 = GPUS.values()
    days = [gpu_hours(large.training_flops(), a100, assumed, epochs) / 32 / 24 for epochs in EPOCHS]

    # The benchmark's utilization is relative to measured matrix products, not to the peak
    matmul_rate = cuda["machine"]["matmul_tflops"]["bf16"] * 1e12
    h200 = matmul_rate / h100.bf16 * cuda_utilization["ours, bf16, compiled"]

    # MAR: 400 epochs in 1 day and 11 hours on 16 H100s with a cache; its head is not counted
    masked = large.num_masked_at(0.5)
    mar = 3 * large.backbone.flops(masked) * 400 * assumed.images / (35 * 3600 * 16 * h100.bf16)
    return {
        "assumed": f"{assumed.utilization:.0%}",
        "cpu": f"{cpu_utilization['ours, bf16']:.0%}",
        "h200": f"{h200:.0%}",
        "mar": f"{mar:.0%}",
        "days": f"{days[0]:.3g} days ({days[1]:.3g} for 800 epochs) "
        f"at {assumed.utilization:.0%} utilization",
    }


def filled_pages(assumed: argparse.Namespace) -> dict[Path, str]:
    """Return the pages with up-to-date estimates, by path."""
    counts = Counts.make()
    values = {table.__name__: f"\n{table(counts, assumed)}" for table in TABLES}
    values |= quoted_numbers(counts, assumed)
    rows = [
        [f"`--{name}`", getattr(assumed, name), meaning] for name, (_, meaning) in ASSUMED.items()
    ]
    values["assumptions"] = "\n" + markdown(["flag", "value", "meaning"], rows)
    pages = {}
    for path in (ROOT / "docs" / "scaling.md", ROOT / "docs" / "reproduce.md", ROOT / "README.md"):
        text = path.read_text()
        for name in re.findall(r"<!-- (\w+) -->", text):
            if name in values:
                text = fill(text, name, values[name])
        pages[path] = text
    return pages


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = get_args_parser().parse_args(argv)
    pages = filled_pages(args)
    print(pages[ROOT / "docs" / "scaling.md"], end="")
    if args.write:
        for path, text in pages.items():
            write_text(path, text)


if __name__ == "__main__":
    errors.run(main)
