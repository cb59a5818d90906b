"""The paper's Table 5: the channel head, with and without cache and with 4 channels, against MAR's diffusion head."""

import copy
from functools import partial

import torch

from benchmarks.baselines import DiffusionHead, sample_recomputing
from benchmarks.common import alternating, finish, machine, parse, spread
from models.channel_head import ChannelHead
from models.fast import compile_blocks, speed_up
from models.tokenbridge import MODELS
from util import misc


def head_of(model: str, channels: int) -> tuple[ChannelHead, float]:
    """The plain head of a model, without its backbone, and its operations for one token."""
    with torch.device("meta"):
        whole = MODELS[model](vae_embed_dim=channels, quant_levels=64)
    return ChannelHead(whole.config, partial(type(whole.head.channel_norm), eps=1e-6)), whole.token_flops()


def main() -> None:
    """Runs the command line."""

    def add(parser) -> None:
        parser.add_argument("--model", choices=MODELS, default="tokenbridge_base")
        parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64], help="of one call")
        parser.add_argument("--compile", action="store_true", help="also measure our head compiled")
        parser.add_argument("--precision", choices=misc.PRECISIONS, nargs="+", default=["fp32", "bf16"])

    args = parse(__doc__, 5, add)
    about = machine(args.device)
    (plain, token_flops), (few, _) = (head_of(args.model, channels) for channels in (16, 4))
    plain, few = plain.to(args.device).eval(), few.to(args.device).eval()
    ours = copy.deepcopy(plain)
    for head in (ours, few):
        speed_up(head)
    if args.compile:
        compiled = copy.deepcopy(ours)
        compile_blocks(compiled)
    diffusion = DiffusionHead(ours.condition_proj.in_features).to(args.device).eval()
    rows = []
    for precision in args.precision:
        torch.compiler.reset()  # which keeps but few programs of a function
        for tokens in args.tokens:
            features = torch.randn(tokens, ours.condition_proj.in_features, device=args.device)
            uniform = torch.rand(tokens, 16, device=args.device)
            works = {
                "diffusion head (MAR), 100 steps": lambda f=features: diffusion.sample(f),
                "diffusion head (MAR), guidance": lambda f=features: diffusion.sample(torch.cat([f, f]), 3.0),
                "channel head, prefix recomputed": partial(sample_recomputing, plain, features, 1.0, uniform),
                "channel head": partial(ours.sample, features, 1.0, uniform),
                "channel head, 4 channels": partial(few.sample, features, 1.0, uniform),
            }
            if args.compile:
                works["channel head, compiled"] = partial(compiled.sample, features, 1.0, uniform)

            def inside(work, precision=precision):
                with torch.no_grad(), misc.autocast(args.device, precision):
                    return work()

            works = {name: partial(inside, work) for name, work in works.items()}
            times = {name: spread(taken) for name, taken in alternating(works, args.repeats, args.device).items()}
            recomputed = times["channel head, prefix recomputed"]["median_s"]
            mar = times["diffusion head (MAR), 100 steps"]["median_s"]
            for name, figures in times.items():
                row = {"way": name, "precision": precision, "tokens": tokens, **figures}
                row["times faster than recomputing"] = recomputed / figures["median_s"]
                row["times faster than diffusion"] = mar / figures["median_s"]
                if name in ("channel head", "channel head, compiled"):
                    peak = about["matmul_tflops"].get(precision)
                    row["utilization"] = token_flops * tokens / figures["median_s"] / peak / 1e12 if peak else None
                rows.append(row)
    finish("head_speed", rows, about, args.json)


if __name__ == "__main__":
    main()
