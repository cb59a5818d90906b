"""The paper's Table 5: seconds to sample tokens with the channel head and MAR's diffusion head.

The channel head is measured with and without its cache, and for 4 channels. The masked head, which
the paper does not have, is measured with 4 steps and with 1.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import DiffusionHead, RecomputingHead
from benchmarks.common import benchmark_parser, finish, machine, parse_flags, timings
from models.channel_head import ChannelHead, Head
from models.masked_head import MaskedHead
from models.tokenbridge import MODELS
from util.model_config import ModelConfig
from util.precision import PRECISIONS, autocast

RECOMPUTING = "channel head, prefix recomputed"
DIFFUSION = "diffusion head (MAR), 100 steps"


def main() -> None:
    """Run the command line."""
    parser = benchmark_parser(__doc__, repeats=5)
    text = "size of the model"
    parser.add_argument("--model", choices=MODELS, default="tokenbridge_base", help=text)
    text = "numbers of tokens sampled at once"
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64], help=text)
    text = "also measure our heads with torch.compile"
    parser.add_argument("--compile", action="store_true", help=text)
    precisions = ["fp32", "bf16"]
    text = "autocast precisions"
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=precisions, help=text)
    args = parse_flags(parser)
    hardware, device = machine(args.device), args.device
    create = MODELS[args.model]
    with torch.device("meta"):  # only configurations are needed: heads run without their backbone
        models = {c: create(vae_embed_dim=c, quant_levels=64) for c in (16, 4)}
        masked = create(quant_levels=64, head="masked")

    def build(config: dict[str, Any], kind: type[Head]) -> Head:
        return kind(ModelConfig.from_stored(config)).to(device).eval()

    heads = {
        RECOMPUTING: build(models[16].config, RecomputingHead),
        "channel head": build(models[16].config, ChannelHead),
        "channel head, 4 channels": build(models[4].config, ChannelHead),
        "masked head": build(masked.config, MaskedHead),
    }
    if args.compile:
        for name in ("channel head", "masked head"):
            compiled = heads[f"{name}, compiled"] = copy.deepcopy(heads[name])
            compiled.compile_blocks()
    feature_dim = models[16].config["decoder_embed_dim"]
    token_flops = models[16].head.sampling_flops()
    diffusion = DiffusionHead(feature_dim).to(device).eval()

    def sample(head: nn.Module, precision: str, *inputs, **options) -> None:
        # One autocast context per call: it keeps copies of the weights until it ends.
        with autocast(device, precision):
            head.sample(*inputs, **options)

    rows = []
    for precision in args.precision:
        # The cache of compiled programs is too small for all precisions and sizes.
        torch.compiler.reset()
        peak = hardware["matmul_tflops"].get(precision)
        for tokens in args.tokens:
            features = torch.randn(tokens, feature_dim, device=device)
            doubled = features.repeat(2, 1)
            functions = {
                DIFFUSION: partial(sample, diffusion, precision, features),
                "diffusion head (MAR), guidance": partial(
                    sample, diffusion, precision, doubled, 3.0
                ),
            }
            for name, head in heads.items():
                uniform = torch.rand(tokens, head.sample_numbers, device=device)
                function = partial(sample, head, precision, features, 1.0, uniform)
                if isinstance(head, MaskedHead):
                    for steps in (4, 1):
                        label = f"{name}, head_steps {steps}"
                        functions[label] = partial(function, head_steps=steps)
                else:
                    functions[name] = function
            times = timings(functions, args.repeats, device)
            for name, seconds in times.items():
                median = seconds["median_s"]
                row = {"way": name, "precision": precision, "tokens": tokens, **seconds}
                row["speedup over recomputation"] = times[RECOMPUTING]["median_s"] / median
                row["speedup over diffusion"] = times[DIFFUSION]["median_s"] / median
                if name in ("channel head", "channel head, compiled"):
                    rate = token_flops * tokens / median / 1e12
                    row["utilization"] = rate / peak if peak else None
                rows.append(row)
    finish("head_speed", rows, hardware, args.json)


if __name__ == "__main__":
    main()
