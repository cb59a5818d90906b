"""Sampling whole images, guidance included: this project's way against the release's in float32."""

import torch

from benchmarks.common import alternating, finish, machine, parse, spread
from benchmarks.other_ways import plain_kernels, sample_tokens_plainly
from models.sampling import sampling_plan
from models.tokenbridge import MODELS, TokenBridge
from util import misc


def flops(model: TokenBridge, num_iter: int) -> float:
    """Of sampling one image with guidance: 2 operations a multiply-add, blocks of backbone and head."""
    c = model.config
    buffer, length, total = c["buffer_size"], model.seq_len, 0.0

    def blocks(depth: int, dim: int, places: int) -> float:
        return depth * (2 * places * (4 + 2 * c["mlp_ratio"]) * dim**2 + 4 * places**2 * dim)

    head = model.head
    token = head.places * (head.depth * 2 * 18 * head.dim**2 + 2 * (2 * head.dim**2 + head.dim * head.classes))
    for step in sampling_plan(num_iter, length, 2.0, "linear"):
        known = buffer + length - step.masked
        passes = blocks(c["encoder_depth"], c["encoder_embed_dim"], known)
        passes += blocks(c["decoder_depth"], c["decoder_embed_dim"], buffer + length)
        total += 2 * passes + (step.masked - step.left) * token
    return total


def main() -> None:
    """Runs the command line."""

    def add(parser) -> None:
        parser.add_argument("--model", choices=MODELS, default="tokenbridge_base")
        parser.add_argument("--batch", type=int, default=1, help="images at once")
        parser.add_argument("--num_iter", type=int, default=16)
        parser.add_argument("--cfg", type=float, default=3.0)
        parser.add_argument(
            "--ways", nargs="+", default=["release", "fp32", "bf16"], help="of release, fp32, bf16, fp16"
        )

    args = parse(__doc__, 3, add)
    about = machine(args.device)
    torch.manual_seed(0)
    model = MODELS[args.model](quant_levels=64).to(args.device).eval().requires_grad_(False)
    labels = torch.arange(args.batch, device=args.device)
    seeds = list(range(args.batch))

    def way(name: str):
        if name == "release":
            with plain_kernels():
                return sample_tokens_plainly(model, labels, args.num_iter, args.cfg, 1.0)
        with misc.autocast(args.device, name):
            return model.sample_tokens(args.batch, args.num_iter, args.cfg, labels=labels, seeds=seeds)

    works = {name: lambda name=name: way(name) for name in args.ways}
    times = {name: spread(taken) for name, taken in alternating(works, args.repeats, args.device).items()}
    rows = []
    for name, figures in times.items():
        precision = "fp32" if name == "release" else name
        work = flops(model, args.num_iter) * args.batch
        row = {"way": "the release's, fp32" if name == "release" else f"ours, {name}", "model": args.model}
        row |= {"batch": args.batch, "steps": args.num_iter, **figures}
        row["images_per_s"] = args.batch / figures["median_s"]
        row["utilization"] = work / figures["median_s"] / misc.matmul_flops(args.device, precision)
        if "release" in times and name != "release":
            row["ratio"] = times["release"]["median_s"] / figures["median_s"]
        rows.append({**row, "peak_memory_gib": misc.memory_in_use(args.device)})
    finish("sampling", rows, about, args.json)


if __name__ == "__main__":
    main()
