"""Flags that several scripts share, and checks of what was typed."""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import yaml

from util import distributed
from util.errors import UserError, where
from util.metrics.tables import FEATURES
from util.model_config import CHECKPOINTED, Metadata, ModelConfig
from util.options import field_of, option_names
from util.precision import PRECISIONS, effective_precision

#: Data loading processes by default: one for each core that this process may use, 10 at most.
WORKERS = min(
    10, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
)

LAUNCHER = "torchrun decides this"
DIFFUSION = "MAR's diffusion loss has this, TokenBridge has none"
#: Flags of the release and of MAR that are not needed here, and why.
NOT_NEEDED = {
    "use_quantized_value": "the release ignores this, tokens are always the quantized values",
    "world_size": LAUNCHER,
    "local_rank": LAUNCHER,
    "dist_on_itp": LAUNCHER,
    "dist_url": LAUNCHER,
    "log_dir": "logs go to --output_dir",
    "diffloss_d": DIFFUSION,
    "diffloss_w": DIFFUSION,
    "num_sampling_steps": DIFFUSION,
    "diffusion_batch_mul": DIFFUSION,
}

#: Where flags are added: a parser, or a group of its flags.
Flags = argparse._ActionsContainer


UNTYPED = object()


class ParsedFlags(argparse.Namespace):
    """Values of flags by name.

    Attributes:
        typed: names of the flags that the command line or ``--config`` sets, also to the default.
            It is not in ``vars()``.
    """

    __slots__ = ("typed",)


def is_typed(args: argparse.Namespace, defaults: argparse.Namespace, name: str) -> bool:
    """Return whether a flag was typed; without :class:`ParsedFlags`, whether it differs.

    Args:
        defaults: flags of an empty command line.
    """
    typed = getattr(args, "typed", None)
    if typed is not None:
        return name in typed
    return getattr(args, name, None) != getattr(defaults, name, None)


class Parser(argparse.ArgumentParser):
    """Parser with defaults in its help, without abbreviated flags, with errors of one line.

    Args:
        config: whether it has ``--config``, a file of flags; one whose flags are all its
            subcommands' has not.
    """

    def __init__(self, *args, config: bool = True, **options):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(*args, **{"formatter_class": formatter, "allow_abbrev": False, **options})
        self.has_config = config
        if config:
            self.add_argument(
                "--config", metavar="FILE", help="YAML of flags and values; flags typed here win"
            )

    def error(self, message: str) -> NoReturn:
        """Print ``error: <message>`` and exit with status 2."""
        self.exit(2, f"{where()}error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        """Parse flags and those of ``--config``; refuse unknown ones. Subcommands use this, too."""
        args = sys.argv[1:] if args is None else args
        namespace = ParsedFlags() if namespace is None else namespace
        parsed, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("-"):
                flag = word.split("=")[0]
                self.error(f"unknown flag {flag}; {advice(flag, self._option_string_actions)}")
        if unknown:
            self.error(f"{unknown[0]} belongs to no flag; --help lists them")
        if self.has_config:
            # Flags that are not typed keep the values that a namespace has already
            probe = argparse.Namespace(**dict.fromkeys(vars(parsed), UNTYPED))
            super().parse_known_args(args, probe)
            typed = {name for name, value in vars(probe).items() if value is not UNTYPED}
            if parsed.config:
                values = self.read_config(parsed.config)
                typed |= values.keys()
                parsed, _ = super().parse_known_args(args, ParsedFlags(**values))
            parsed.typed = frozenset(typed)
        return parsed, []

    def read_config(self, path: str) -> dict[str, Any]:
        """Return the values of the flags in a YAML file, converted and checked as if typed."""
        try:
            flags = yaml.load(Path(path).read_text(), yaml.BaseLoader)  # values stay text
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"{path} cannot be read as YAML: {' '.join(str(error).split())}")
        if not isinstance(flags, dict):
            self.error(f"{path} must hold lines of the form 'flag: value'")
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.option_strings and action.dest not in ("help", "config"):
                actions |= {flag.removeprefix("--"): action for flag in action.option_strings}
                actions.setdefault(action.dest, action)
        values = {}
        for name, value in flags.items():
            if name not in actions:
                self.error(f"{path}: unknown flag {name}; {advice(name, actions)}")
            action = actions[name]
            if action.nargs == 0:
                values[action.dest] = self.read_switch(action, name, value, path)
            elif isinstance(value, str) or (isinstance(value, list) and action.nargs):
                words = [value] if isinstance(value, str) else list(map(str, value))
                try:
                    if not words:
                        raise argparse.ArgumentError(action, "expected at least one argument")
                    values[action.dest] = self._get_values(action, words)
                except argparse.ArgumentError as error:
                    self.error(str(error))
            else:
                self.error(f"{path}: {name} takes one value, not {value}")
        return values

    def read_switch(self, action: argparse.Action, name: str, value: Any, path: str) -> bool:
        """Return the value of a flag without an argument, by its name or that of its variable."""
        text = str(value).lower()
        if text not in ("true", "false"):
            self.error(f"{path}: {name} is true or false, not {value}")
        if f"--{name}" in action.option_strings:  # such as no_pin_mem, which turns pin_mem off
            return (text == "true") == action.const
        return text == "true"


def advice(name: str, known: Iterable[str]) -> str:
    """Suggest the closest known name, or point to --help if none is close.

    For flags of the release or of MAR that are not needed here, return the reason.
    """
    if reason := NOT_NEEDED.get(name.lstrip("-").replace("-", "_")):
        return f"{reason}: leave it out"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else "--help lists the flags"


def new_parser(description: str, module: str | None = None, config: bool = True) -> Parser:
    """Return the parser of a script, or of ``python -m module``.

    Args:
        config: see :class:`Parser`.
    """
    return Parser(module and f"python -m {module}", description=description, config=config)


def add_run_args(parser: Flags, batch_size: int, seed: int, precision: str) -> None:
    """Add the flags of batches, workers, device, precision and seed."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size", type=int, default=batch_size, help="images at once on each device"
    )
    group.add_argument("--seed", type=int, default=seed, help="seed of all random numbers")
    group.add_argument(
        "--num_workers", type=int, default=WORKERS, help="data loading processes for each device"
    )
    group.add_argument(
        "--pin_mem", action="store_true", help="pin host memory for faster transfers"
    )
    group.add_argument(
        "--no_pin_mem", action="store_false", dest="pin_mem", help="do not pin host memory"
    )
    group.set_defaults(pin_mem=True)
    add_device_arg(group)
    text = "on CUDA, compute the same bits in every run, more slowly; on the CPU this is always so"
    group.add_argument("--deterministic", action="store_true", help=text)
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=precision,
        help="precision of autocast; fp32 means none",
    )


def add_device_arg(parser: Flags) -> None:
    """Add the flag of the device."""
    text = "cuda, cuda:N, mps (Apple GPUs) or cpu; by default cuda where there is one, else cpu"
    parser.add_argument("--device", help=text)


def add_vae_arg(parser: Flags) -> None:
    """Add the flag of the tokenizer's file."""
    text = (
        "tokenizer: the published KL-16; one of main_vae.py, a folder of diffusers, or a tiny "
        "autoencoder's folder, which bring their own sizes and latent factor; or "
        "hf://owner/repo[/path]"
    )
    parser.add_argument("--vae_path", default="pretrained_models/vae/kl16.ckpt", help=text)


def add_mirror_arg(parser: Flags) -> None:
    """Add the flag that turns mirror images off in training."""
    text = (
        "never train on mirror images, for data whose meaning they change (digits, text); by "
        "default half are mirrored"
    )
    parser.add_argument("--no_mirror", action="store_false", dest="mirror", help=text)


def add_training_args(
    parser: Flags, settings: type, without: Collection[str] = (), **defaults: Any
) -> None:
    """Add the flags of the training loop.

    Args:
        settings: :class:`util.training_settings.TrainingSettings`.
        without: settings that the script has no flag for.
        defaults: defaults that differ from those of ``settings``.
    """
    for field in dataclasses.fields(settings):
        if field.metadata and field.name not in without:
            changes = {"default": defaults[field.name]} if field.name in defaults else {}
            add_option(parser, settings, field.name, **changes)


def add_skip_arg(parser: Flags) -> None:
    """Add the flag that skips images that cannot be read."""
    text = (
        "skip images that cannot be read and list them in bad_images-rank<n>.txt; by default they "
        "are errors"
    )
    parser.add_argument("--skip_bad_images", action="store_true", help=text)


#: What ``--data_path`` may be.
DATA_PATH = (
    "folder of train/<class>/<image>, and val/ or test/ of the same form; of <class>/<image> or "
    "<image>, all for training; of parquet files; or hf://datasets/owner/name"
)


def add_column_args(parser: Flags) -> None:
    """Add the flags that name columns of a data set in rows."""
    text = "column of the images in parquet files or a data set of the Hub; found by default"
    parser.add_argument("--image_column", help=text)
    parser.add_argument(
        "--label_column", help="column of the labels; none: all images are of one class"
    )


def add_metrics_args(parser: Flags) -> None:
    """Add the flags of the features, their network's weights and the reference of metrics."""
    add_features_args(parser)
    text = (
        ".npz with mu and sigma of the reference, for FID; with other features their Frechet "
        "distance; by default ADM's for ImageNet 256"
    )
    parser.add_argument("--fid_stats", help=text)
    text = (
        "reference images for precision, recall and KID, and for FID without --fid_stats, or "
        "their counterparts with other features"
    )
    parser.add_argument("--reference", help=text)


def add_features_args(parser: Flags) -> None:
    """Add the flags of the network whose features compare images."""
    parser.add_argument(
        "--features",
        choices=FEATURES,
        default="inception",
        help="network whose features compare images; only with inception is the distance an FID",
    )
    parser.add_argument(
        "--feature_weights",
        "--inception_weights",
        help="weights of that network: file or hf:// address; by default the published ones, where "
        "tools.download puts Inception's, where pip puts EfficientNet's, else from the Hub",
    )


def add_option(parser: Flags, options: type, name: str, **changes: Any) -> None:
    """Add the flag of one field of a dataclass, see :func:`util.options.option`.

    Args:
        options: the dataclass.
        name: the field.
        changes: arguments of ``add_argument`` that replace those of the field.
    """
    field = field_of(options, name)
    argument = {"default": field.default, **field.metadata["argument"], **changes}
    if field.default is False:
        argument["action"] = "store_true"
    else:
        argument["type"] = scalar_type(get_type_hints(options)[name])
    parser.add_argument(field.metadata["flag"] or f"--{name}", **argument)


def scalar_type(annotation: Any) -> type:
    """Return the type of a flag's value: int or float if the annotation contains it, else str."""
    return next((kind for kind in (int, float) if kind in (annotation, *get_args(annotation))), str)


def add_model_args(parser: argparse.ArgumentParser, choices: Mapping[str, Iterable[str]]) -> None:
    """Add the flags of the model.

    Args:
        choices: values of ``model``, ``head`` and ``quantizer``.
    """
    group = parser.add_argument_group("model")
    add_option(group, Metadata, "model", choices=choices["model"])
    add_vae_arg(group)
    for field in dataclasses.fields(ModelConfig):
        if field.metadata["flag"]:
            values = {"choices": choices[field.name]} if field.name in choices else {}
            add_option(group, ModelConfig, field.name, **values)
    text = "the parts that --grad_checkpointing recomputes; by default all"
    group.add_argument("--checkpoint_blocks", nargs="+", choices=CHECKPOINTED, help=text)
    add_calibration_arg(group)


def add_quantizer_args(parser: Flags, quantizers: Iterable[str], default: str) -> None:
    """Add the flags that define the levels of the quantizer."""
    add_option(parser, ModelConfig, "quantizer", choices=quantizers, default=default)
    add_calibration_arg(parser)


def add_calibration_arg(parser: Flags) -> None:
    """Add the flag that measures each channel's mean and standard deviation for the quantizer."""
    text = "set each channel's range to its measured mean +- 3 sqrt(3) standard deviations"
    parser.add_argument("--quant_calibrate", action="store_true", help=text)


def add_sampling_args(parser: Flags, options: type, search: bool = False) -> None:
    """Add the flags of sampling.

    Args:
        options: :class:`models.sampling.SamplingOptions`.
        search: whether ``--cfg`` and ``--temperature`` take several values.
    """
    for name in option_names(options):
        changes = {}
        if search and name in ("cfg", "temperature"):
            text = field_of(options, name).metadata["argument"]["help"]
            changes = {"nargs": "+", "help": f"{text}; several values are searched"}
        add_option(parser, options, name, **changes)


def check_bits(bits: int, flag: str, continuous: bool = False) -> None:
    """Raise UserError unless ``bits`` is 1 to 9, or -1 if ``continuous`` latents are allowed."""
    if not (1 <= bits <= 9 or (continuous and bits == -1)):
        also = ", or -1 for continuous latents" if continuous else ""
        raise UserError(f"{flag} {bits}: choose 1 to 9 bits, that is 2 to 512 levels{also}")


def check_range(args: argparse.Namespace, low: float, high: float, *names: str) -> None:
    """Raise UserError unless each named flag lies in [low, high]."""
    for name in names:
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} {getattr(args, name)}: it must lie between {low} and {high}")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError unless each named flag is above zero."""
    for name in names:
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: it must be above zero")


#: Flags that may differ between machines: of paths, the files' contents matter.
OF_A_MACHINE = (
    "config",
    "device",
    "num_workers",
    "pin_mem",
    "data_path",
    "image_dir",
    "cached_path",
    "cached_val_path",
    "vae_path",
)


def check_same_flags(args: argparse.Namespace, device: torch.device) -> None:
    """Check that all ranks have the same flags, and compute in the same precision.

    Replace ``precision`` and ``vae_precision`` by :func:`util.precision.effective_precision`, so
    that files of the run name the precision that they were computed in.

    Raises:
        UserError: ranks differ; all end with it.
    """
    flags = {f"--{name}": value for name, value in vars(args).items() if name not in OF_A_MACHINE}
    distributed.check_equal(flags, "start all processes with the same flags")
    typed = {
        name: value
        for name in ("precision", "vae_precision")
        if (value := getattr(args, name, None))
    }
    computed = {name: effective_precision(device.type, value) for name, value in typed.items()}
    distributed.check_equal(
        {
            f"the precision that --{name} {typed[name]} runs in": value
            for name, value in computed.items()
        },
        "the CPUs of these machines have different instructions: pass --precision fp32, or use "
        "machines of one kind",
    )
    vars(args).update(computed)
