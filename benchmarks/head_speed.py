"""The paper's Table 5: the channel head, with and without cache and with 4 channels, against MAR's diffusion head.

The masked head, which the paper does not have, is measured with them, in 4 steps and in 1.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import DiffusionHead, RecomputingHead
from benchmarks.common import benchmark_parser, finish, machine, parse, timings
from models.channel_head import ChannelHead, Head
from models.masked_head import MaskedHead
from models.tokenbridge import MODELS
from util import misc
from util.model_config import ModelConfig


def main() -> None:
    """Runs the command line."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--model", choices=MODELS, default="tokenbridge_base", help="size of the model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64], help="tokens sampled at once")
    parser.add_argument("--compile", action="store_true", help="also measure our heads compiled")
    parser.add_argument("--precision", choices=misc.PRECISIONS, nargs="+", default=["fp32", "bf16"], help="of autocast")
    args = parse(parser)
    hardware, device = machine(args.device), args.device
    with torch.device("meta"):  # for their configurations: a head is measured without its backbone
        models = {channels: MODELS[args.model](vae_embed_dim=channels, quant_levels=64) for channels in (16, 4)}
        masked = MODELS[args.model](quant_levels=64, head="masked")

    def head_of(config: dict[str, Any], kind: type[Head] = ChannelHead) -> Head:
        return kind(ModelConfig.from_stored(config)).to(device).eval()

    ours = {"channel head": head_of(models[16].config), "channel head, 4 channels": head_of(models[4].config)}
    ours["masked head"] = head_of(masked.config, MaskedHead)
    if args.compile:
        ours |= {f"{name}, compiled": copy.deepcopy(ours[name]) for name in ("channel head", "masked head")}
    for name, head in ours.items():
        if name.endswith("compiled"):
            head.compile_blocks()
    heads = {"channel head, prefix recomputed": head_of(models[16].config, RecomputingHead), **ours}
    feature_dim, token_flops = models[16].config["decoder_embed_dim"], models[16].head.sampling_flops()
    diffusion = DiffusionHead(feature_dim).to(device).eval()

    def sample(head: nn.Module, precision: str, *inputs, **options) -> None:
        with misc.autocast(device, precision):  # anew in each run: autocast keeps weights' copies to its end
            head.sample(*inputs, **options)

    rows = []
    for precision in args.precision:
        torch.compiler.reset()  # it keeps few programs of a function, too few for all precisions and sizes
        for tokens in args.tokens:
            features = torch.randn(tokens, feature_dim, device=device)
            works = {
                "diffusion head (MAR), 100 steps": partial(sample, diffusion, precision, features),
                "diffusion head (MAR), guidance": partial(sample, diffusion, precision, features.repeat(2, 1), 3.0),
            }
            for name, head in heads.items():
                uniform = torch.rand(tokens, head.sample_numbers, device=device)
                for steps in (4, 1) if isinstance(head, MaskedHead) else (None,):
                    options = {} if steps is None else {"head_steps": steps}
                    work = partial(sample, head, precision, features, 1.0, uniform, **options)
                    works[name if steps is None else f"{name}, head_steps {steps}"] = work
            times = timings(works, args.repeats, device)
            recomputed, mar = times["channel head, prefix recomputed"], times["diffusion head (MAR), 100 steps"]
            for name, figures in times.items():
                row = {"way": name, "precision": precision, "tokens": tokens, **figures}
                row["times faster than recomputing"] = recomputed["median_s"] / figures["median_s"]
                row["times faster than diffusion"] = mar["median_s"] / figures["median_s"]
                if name in ("channel head", "channel head, compiled"):
                    peak = hardware["matmul_tflops"].get(precision)
                    row["utilization"] = token_flops * tokens / figures["median_s"] / peak / 1e12 if peak else None
                rows.append(row)
    finish("head_speed", rows, hardware, args.json)


if __name__ == "__main__":
    main()
