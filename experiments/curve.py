"""Store the training curve of a run: loss by epoch, and what it measured on held-out images."""

import argparse
import math

from util import errors
from util.args import new_parser
from util.checkpoint.runs import find_checkpoint, read_run
from util.files import write_json
from util.metrics.run_log import epoch_means, logged_scalars
from util.model_config import ModelConfig
from util.provenance import provenance

NATS = "eval/nats_per_dim"


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command line of this module."""
    parser = new_parser(__doc__, "experiments.curve")
    parser.add_argument("--run", default="", help="folder of a run of main_tokenbridge.py")
    parser.add_argument("--title", default="", help="title of the curve in plots")
    parser.add_argument("--json", default="", help="file to write")
    return parser


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    for name in ("run", "json"):
        if not getattr(args, name):
            raise errors.UserError(f"--{name} is missing; see --help")
    run = read_run(find_checkpoint(args.run))
    epoch_steps = run["steps_per_epoch"]
    losses = epoch_means(logged_scalars(args.run, "train/loss"), epoch_steps)
    nats = {}
    if run["args"].get("online_nll"):
        by_step = logged_scalars(args.run, NATS)
        nats = {str(step // epoch_steps): value for step, value in by_step.items()}
    config = ModelConfig.from_stored(run["config"])
    content = {
        "title": args.title or args.run,
        "loss": losses,
        "nats": nats,
        "uniform_loss": config.channels_per_group * math.log(config.quant_levels),
        **provenance(),
    }
    write_json(args.json, content)


if __name__ == "__main__":
    errors.run(main)
