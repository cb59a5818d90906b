"""Computes what a training takes on many GPUs, from operations and bytes, without one: docs/scaling.md."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
from util.tables import fill, markdown, write_text

ROOT = Path(__file__).resolve().parent.parent

# --------------------------------------------------------------------------------------------------------------------
# What is assumed.


class Gpu(NamedTuple):
    """Vendor's peak rates of one GPU, and of the InfiniBand port beside it in the vendor's own machines."""

    bf16: float  # operations a second, dense
    tf32: float
    nvlink: float  # bytes a second, one way
    port: float


GPUS = {  # H200 has more and faster memory than H100, and the same rates otherwise
    "A100": Gpu(312e12, 156e12, 300e9, 25e9),
    "H100, H200": Gpu(989e12, 494.5e12, 450e9, 50e9),
}
COUNTS = (8, 32, 256)
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
    "num_iter": (256, "sampling steps, with guidance"),
    "eval_bsz": (256, "images sampled at once per GPU"),
}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    parser = new_parser(__doc__, "tools.scaling")
    for name, (default, what) in ASSUMED.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=what)
    parser.add_argument(
        "--write", action="store_true", help="write the tables into docs/scaling.md and README.md"
    )
    return parser


# --------------------------------------------------------------------------------------------------------------------
# What is counted.


@torch.no_grad()
def counted(function, *shape: int) -> float:
    """Floating-point operations of a function of a tensor of this shape, matrix products and convolutions alone."""
    with FlopCounterMode(display=False) as counter:
        function(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


class Counts(NamedTuple):
    """Operations and bytes, from the models themselves on the meta device: nothing is computed."""

    models: dict[str, TokenBridge]
    encode: float  # of the VAE, for one image
    decode: float
    inception: float

    @classmethod
    def make(cls) -> "Counts":
        """Builds and counts everything; takes seconds."""
        with torch.device("meta"):
            models = {
                name: MODELS[f"tokenbridge_{name}"](quant_levels=64).eval()
                for name in ("large", "huge")
            }
            vae, inception = (
                AutoencoderKL(**KL16_CONFIG).eval(),
                inception_v3(init_weights=False).eval(),
            )
        sizes = counted(vae.encode, 1, 3, 256, 256), counted(vae.decode, 1, 16, 16, 16)
        return cls(models, *sizes, counted(inception, 1, 3, 299, 299))


def parameters(model: TokenBridge) -> int:
    """The number of learned values."""
    return sum(parameter.numel() for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------------------
# What follows.


def seconds_an_image(flops: float, gpu: Gpu, a: argparse.Namespace, encode: float = 0.0) -> float:
    """Of one GPU, for a training step's ``flops`` in bf16 and the VAE's in fp32, whose convolutions run in TF32."""
    return (flops / gpu.bf16 + encode / gpu.tf32) / a.utilization


def gpu_hours(
    flops: float, gpu: Gpu, a: argparse.Namespace, epochs: int, encode: float = 0.0
) -> float:
    """Of a training."""
    return epochs * a.images * seconds_an_image(flops, gpu, a, encode) / 3600


def all_reduce_seconds(
    size: float, count: int, gpu: Gpu, a: argparse.Namespace, ports: int
) -> float:
    """Of a ring over ``count`` GPUs: each link carries 2 (n - 1) / n times the bytes; the slowest one decides."""
    rate = gpu.nvlink if count <= a.node else min(gpu.nvlink, ports * gpu.port)
    return 2 * (count - 1) / count * size / rate


def launches(model: TokenBridge, a: argparse.Namespace) -> tuple[int, int]:
    """Of one step of sampling, by the backbone's blocks and by the head's, which run once a channel step."""
    backbone = model.config["encoder_depth"] + model.config["decoder_depth"]
    return a.launches * backbone, a.launches * model.head.depth * model.head.channel_steps


def sampling_seconds(model: TokenBridge, gpu: Gpu, a: argparse.Namespace) -> tuple[float, float]:
    """Of a batch, by backbone and head: of each step, what its operations take or what launching them takes."""
    rate, backbone, head = gpu.bf16 * a.utilization / a.eval_bsz, 0.0, 0.0
    waits = [1e-6 * a.launch * count for count in launches(model, a)]
    for step in sampling_plan(SamplingOptions(a.num_iter), model.seq_len):
        backbone += max(
            2 * model.backbone.flops(step.masked) / rate, waits[0]
        )  # guidance doubles the batch
        head += max((step.masked - step.left) * model.head.sampling_flops() / rate, waits[1])
    return backbone, head


# --------------------------------------------------------------------------------------------------------------------
# The tables. Each takes what was counted and what is assumed.


def operations(c: Counts, a: argparse.Namespace) -> str:
    rows = [
        [name, f"{parameters(m) / 1e6:.1f}M", m.training_flops() / 1e12, c.encode / 1e12]
        + [epochs * a.images * m.training_flops() / 1e18 for epochs in (400, 800)]
        for name, m in c.models.items()
    ]
    header = ["model", "parameters", "training, per image", "VAE, per image"]
    return markdown([*header, *(f"{epochs} epochs (10^18)" for epochs in (400, 800))], rows)


def hours(c: Counts, a: argparse.Namespace) -> str:
    rows = []
    for name, model in c.models.items():
        for epochs in (400, 800):
            for data, encode in (("cached", 0.0), ("images", c.encode)):
                for kind, gpu in GPUS.items():
                    total = gpu_hours(model.training_flops(), gpu, a, epochs, encode)
                    each = [f"{total / count:,.1f}" for count in COUNTS]
                    rows.append([name, epochs, data, kind, f"{total:,.0f}", *each])
    return markdown(
        ["model", "epochs", "data", "GPU", "GPU-hours", *(f"hours on {n}" for n in COUNTS)], rows
    )


def communication(c: Counts, a: argparse.Namespace) -> str:
    rows = []
    for name, model in c.models.items():
        size = 4 * parameters(model)
        for kind, gpu in GPUS.items():
            for count in COUNTS:
                backward = (
                    2 / 3 * a.batch / count * seconds_an_image(model.training_flops(), gpu, a)
                )
                times = [all_reduce_seconds(size, count, gpu, a, ports) for ports in (a.ports, 1)]
                shares = [f"{1e3 * time:.1f} ms, {time / backward:.1%}" for time in times]
                row = [
                    name,
                    f"{size / 2**30:.2f} GiB",
                    kind,
                    count,
                    f"{a.batch / count:g}",
                    f"{1e3 * backward:,.0f} ms",
                ]
                rows.append([*row, shares[0], shares[1] if count > a.node else None])
    header = [
        "model",
        "gradients",
        "GPU",
        "GPUs",
        "images per GPU",
        "backward pass",
        "all-reduce",
        "with one port",
    ]
    return markdown(header, rows)


def binding(c: Counts, a: argparse.Namespace) -> str:
    rows = []
    for name, model in c.models.items():
        for kind, gpu in GPUS.items():
            backward = (
                2 / 3 * a.batch * seconds_an_image(model.training_flops(), gpu, a)
            )  # of one GPU
            rates = [
                min(gpu.nvlink, ports * gpu.port) / (2 * 4 * parameters(model))
                for ports in (a.ports, 1)
            ]
            rows.append([name, kind, *(f"{backward * rate:,.0f}" for rate in rates)])
    return markdown(["model", "GPU", "limit, GPUs", "with one port"], rows)


def loading(c: Counts, a: argparse.Namespace) -> str:
    results = read_json(ROOT / "benchmarks" / "results" / "cpu-loader.json")["rows"]
    measured = {row["cache"]: row["images_per_s"] for row in results if row["workers"] == 0}
    rows = []
    for name, model in c.models.items():
        for kind, gpu in GPUS.items():
            rate = 1 / seconds_an_image(model.training_flops(), gpu, a)
            feeds = [
                f"{measured[way] / rate:,.0f}" for way in ("one file per image", "packed, fp32")
            ]
            workers = 1 / seconds_an_image(model.training_flops(), gpu, a, c.encode) / a.decoded
            read = f"{COUNTS[-1] * rate * 2**15 / 1e9:.2f} GB/s"
            rows.append([name, kind, f"{rate:.0f}", *feeds, read, f"{workers:.1f}"])
    header = ["model", "GPU", "images/s per GPU", "GPUs per reader: files", "packed"]
    return markdown(
        [*header, f"read rate, {COUNTS[-1]} GPUs", "from images: workers per GPU"], rows
    )


def files(c: Counts, a: argparse.Namespace) -> str:
    views = (
        2 * 2 * 16 * 16 * 16
    )  # moments, mean and log-variance of 16 channels on 16 x 16 places, of two views
    rows = [
        [f"cache, {dtype}", a.images * views * size / 2**30]
        for dtype, size in (("fp32", 4), ("fp16, bf16", 2))
    ]
    rows = [[*row, None, *[None] * len(COUNTS)] for row in rows]
    gpu = GPUS["H100, H200"]
    for name, model in c.models.items():
        size = 16 * parameters(
            model
        )  # weights, their average, and the optimizer's two moments, in fp32
        seconds = size / (1e9 * a.disk)
        between = gpu_hours(model.training_flops(), gpu, a, a.save_last_freq) * 3600
        shares = [f"{seconds / (between / count):.1%}" for count in COUNTS]
        rows.append([f"checkpoint, {name}", size / 2**30, f"{seconds:.1f} s", *shares])
    return markdown(
        ["file", "GiB", "time to write", *(f"share of training, {n} H100" for n in COUNTS)], rows
    )


def fid(c: Counts, a: argparse.Namespace) -> str:
    rows, images = [], 50_000
    for name, model in c.models.items():
        for kind, gpu in GPUS.items():
            batches = math.ceil(math.ceil(images / a.eval_bsz) / a.node)  # of one GPU
            parts = [batches * seconds for seconds in sampling_seconds(model, gpu, a)]
            parts.append(images * c.decode / gpu.bf16 / a.utilization / a.node)
            parts.append(images * c.inception / gpu.tf32 / a.utilization / a.node)
            minutes = [f"{seconds / 60:.1f}" for seconds in (*parts, sum(parts))]
            rows.append(
                [name, kind, " + ".join(f"{count:,}" for count in launches(model, a)), *minutes]
            )
    header = ["model", "GPU", "launches per step", "backbone", "head", "VAE", "Inception", "total"]
    return markdown(header, rows)


def sentences(c: Counts, a: argparse.Namespace) -> dict[str, str]:
    """The figures that stand in running text, by the name of their place."""
    cpu, cuda = (
        read_json(ROOT / "benchmarks" / "results" / f"{device}-training.json")
        for device in ("cpu", "cuda")
    )
    of_cpu, of_h200 = (
        {row["way"]: row["utilization"] for row in file["rows"]} for file in (cpu, cuda)
    )
    large, a100, h100 = c.models["large"], *GPUS.values()
    days = {
        epochs: gpu_hours(large.training_flops(), a100, a, epochs) / 32 / 24
        for epochs in (400, 800)
    }
    # 1 day and 11 hours on 16 H100s, cached, 400 epochs; MAR's own head is not counted.
    masked = large.num_masked_at(0.5)
    mar = 3 * large.backbone.flops(masked) * 400 * a.images / (35 * 3600 * 16 * h100.bf16)
    return {
        "assumed": f"{a.utilization:.0%}",
        "cpu": f"{of_cpu['ours, bf16']:.0%}",
        "h200": f"{cuda['machine']['matmul_tflops']['bf16'] * 1e12 / h100.bf16 * of_h200['ours, bf16, compiled']:.0%}",
        "mar": f"{mar:.0%}",
        "days": f"{days[400]:.1f} days ({days[800]:.1f} for 800 epochs) at {a.utilization:.0%} utilization",
    }


TABLES = (operations, hours, communication, binding, loading, files, fid)


def pages(a: argparse.Namespace) -> dict[Path, str]:
    """The pages that quote these figures, filled in."""
    counts = Counts.make()
    values = {table.__name__: f"\n{table(counts, a)}" for table in TABLES} | sentences(counts, a)
    assumed = [[f"`--{name}`", getattr(a, name), what] for name, (_, what) in ASSUMED.items()]
    values["assumptions"] = "\n" + markdown(["flag", "value", "meaning"], assumed)
    texts = {path: path.read_text() for path in (ROOT / "docs" / "scaling.md", ROOT / "README.md")}
    for path, text in texts.items():
        for name in re.findall(r"<!-- (\w+) -->", text):
            text = fill(text, name, values[name]) if name in values else text
        texts[path] = text
    return texts


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args(argv)
    texts = pages(args)
    print(texts[ROOT / "docs" / "scaling.md"], end="")
    if args.write:
        for path, text in texts.items():
            write_text(path, text)


if __name__ == "__main__":
    errors.run(main)
