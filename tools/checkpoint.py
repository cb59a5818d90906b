"""Show, convert and export checkpoints: ``python -m tools.checkpoint show|convert|export``."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import errors
from util.args import new_parser
from util.checkpoint import hub, safetensors_io
from util.checkpoint.files import (
    CHECKPOINT_NAME,
    SAFE_NAME,
    VAE_NAMES,
    config_beside,
    read_checkpoint,
)
from util.checkpoint.runs import check_run
from util.checkpoint.tiny_files import locate_tokenizer, pair_of, read_pair
from util.checkpoint.vae_files import save_vae_folder
from util.errors import UserError
from util.files import read_json, written_whole
from util.log import log, start_log
from util.metrics.tables import METRIC_TITLES

#: File names to look for in the folder of a model or tokenizer, in this order.
CONTENT_NAMES = (CHECKPOINT_NAME, SAFE_NAME, *VAE_NAMES)
#: Names of weights that only tokenizers have: KL VAEs, and tiny autoencoders.
TOKENIZER_WEIGHTS = ("post_quant_conv.weight", "decoder.1.weight")


def read_content(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, or the weights of both files of a tiny autoencoder.

    Raises:
        UserError: see :func:`util.checkpoint.files.read_checkpoint`.
    """
    pair = pair_of(path)
    return {"model": read_pair(pair)} if pair else read_checkpoint(path)


def convert(source: str | Path, target: str | Path, weights: str | None = None) -> None:
    """Write a checkpoint in the format that the suffix of ``target`` names.

    Args:
        target: ends in ``.safetensors``, ``.pth`` or ``.ckpt``.
        weights: ``"model"`` or ``"model_ema"`` writes only these weights and the quantizer's
            tables; None writes everything.

    Raises:
        UserError: ``source`` cannot be read or has no such weights, or ``target`` has another
            suffix or exists.
    """
    target = Path(target)
    if target.suffix not in (safetensors_io.SUFFIX, ".pth", ".ckpt"):
        raise UserError(f"{target}: choose a name that ends in {safetensors_io.SUFFIX} or .pth")
    if target.exists():
        raise UserError(f"{target} exists already; choose another name")
    content = read_checkpoint(source)
    if weights is not None:
        if not isinstance(content.get(weights), Mapping):
            raise UserError(f"{source} has no weights under '{weights}'")
        # The EMA has no buffers: the quantizer's tables are in "model"
        model = content.get("model")
        tables = model if isinstance(model, Mapping) else {}
        content = {
            "model": {**tables, **content[weights]},
            **{name: content[name] for name in ("config", "args", "epoch") if name in content},
            "averaged": weights == "model_ema",
        }
    try:
        if target.suffix == safetensors_io.SUFFIX:
            safetensors_io.write(target, content)
        else:
            with written_whole(target) as file:
                torch.save(content, file)
    except ValueError as error:
        raise UserError(f"{source} cannot be converted: {error}") from error


def summary(path: str | Path, tensors: bool = False) -> list[str]:
    """Return lines of text that describe the content of a checkpoint.

    Args:
        tensors: add a line for each tensor.
    """
    path = locate_tokenizer(path, CONTENT_NAMES)
    content = read_content(path)
    if "config" not in content and (config := config_beside(path)):
        content["config"] = config
    size = sum(file.stat().st_size for file in pair_of(path) or [path])
    lines = [f"{path}: {size / 2**20:,.1f} MiB"]
    for name, value in content.items():
        if is_state(value):
            count = sum(tensor.numel() for tensor in value.values())
            dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in value.values()}
            lines.append(
                f"{name}: {len(value)} tensors, {count / 1e6:,.2f}M values, "
                + ", ".join(sorted(dtypes))
            )
            if tensors:
                for key, tensor in value.items():
                    lines.append(f"    {key} {list(tensor.shape)} {tensor.dtype}")
        elif name == "optimizer" and isinstance(value, Mapping):
            lines.append(f"{name}: state of {len(value.get('state', {}))} parameters")
        elif isinstance(value, Mapping | argparse.Namespace):
            entries = value if isinstance(value, Mapping) else vars(value)
            lines.append(f"{name}:")
            lines += [f"    {key}: {shortened(entry)}" for key, entry in entries.items()]
        else:
            lines.append(f"{name}: {shortened(value)}")
    return lines


def is_state(value: Any) -> bool:
    """Return whether ``value`` is a mapping of names to tensors, and not empty."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(entry, Tensor) for entry in value.values())
    )


def shortened(value: Any) -> str:
    """Return a value as text of at most 100 characters."""
    text = f"tensor {list(value.shape)}" if isinstance(value, Tensor) else str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def export(args: argparse.Namespace) -> None:
    """Write a folder that ``from_pretrained`` reads, and upload it with ``--push_to_hub``.

    Raises:
        UserError: a file is missing, damaged or exists already, or the Hub refuses the upload.
    """
    folder = Path(args.folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another folder")
    source = locate_tokenizer(args.source, CONTENT_NAMES)
    if "_class_name" in (config_beside(source) or {}):
        raise UserError(
            f"{source} is a diffusers tokenizer, which from_pretrained reads without an export"
        )
    content = read_content(source)
    address = hub.Address(args.push_to_hub or "", None, "")
    if args.push_to_hub:  # first, so that nothing is written if it fails
        with hub.explained(address, "write to"):
            hub.make_repo(args.push_to_hub, args.private)
    states = [content.get(name) or content for name in ("model", "state_dict")]
    if any(name in state for state in states for name in TOKENIZER_WEIGHTS):
        vae, latent_factor = AutoencoderKL.from_pretrained(str(source))
        if args.figures or args.licence or args.tokenizer:
            raise UserError(
                f"{source} is a tokenizer, which has no model card: "
                "remove --figures, --licence and --tokenizer"
            )
        save_vae_folder(folder, vae, latent_factor)
    else:
        metrics = read_json(args.figures) if args.figures else None
        if args.figures and not (isinstance(metrics, dict) and set(METRIC_TITLES) & set(metrics)):
            raise UserError(
                f"{args.figures} holds no metrics: name the samples.json of an evaluation that "
                "measured some"
            )
        card = {
            "figures": metrics,
            "licence": args.licence,
            "tokenizer": args.tokenizer,
            "repo_id": args.push_to_hub or str(folder),
        }
        ema = False if args.no_ema else None  # None: the EMA if there is one
        model = TokenBridge.from_content(check_run(content, source), source, ema)
        model.save_pretrained(folder, model_card_kwargs=card)
    log.info("wrote %s from %s", folder, source)
    if args.push_to_hub:
        with hub.explained(address, "write to"):
            print(HfApi().upload_folder(repo_id=args.push_to_hub, folder_path=folder))


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    description = "Show what is in a checkpoint, convert between .pth and .safetensors without "
    description += "loss, or export a model."
    parser = new_parser(description, "tools.checkpoint", config=False)
    commands = parser.add_subparsers(dest="command", required=True)

    show = commands.add_parser("show", help="show what is in a file")
    show.add_argument("file", help="a checkpoint, its folder, or an address on the Hub")
    show.add_argument("--tensors", action="store_true", help="list every tensor, too")

    convert = commands.add_parser("convert", help="convert .pth to .safetensors, or back")
    convert.add_argument("source", help="file to read")
    convert.add_argument("target", help="file to write; the suffix decides on the format")
    convert.add_argument(
        "--weights",
        choices=["model", "model_ema"],
        help="write only these weights; by default everything",
    )

    export = commands.add_parser(
        "export", help="write a model or tokenizer to a folder for from_pretrained, or to the Hub"
    )
    export.add_argument(
        "source", help="a checkpoint, its folder, a tokenizer, or an address on the Hub"
    )
    export.add_argument("folder", help="folder for model.safetensors, config.json and a model card")
    export.add_argument(
        "--no_ema", action="store_true", help="export the trained weights instead of their EMA"
    )
    export.add_argument("--figures", help="samples.json of an evaluation, for the model card")
    export.add_argument("--licence", help="license of the weights, such as mit, for the model card")
    export.add_argument("--tokenizer", help="address of the tokenizer, for the model card")
    export.add_argument(
        "--push_to_hub",
        metavar="OWNER/REPO",
        help="also upload the folder to this repository, which is created if it is missing",
    )
    export.add_argument("--private", action="store_true", help="create a private repository")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = get_args_parser().parse_args(argv)
    start_log()
    if args.command == "show":
        print("\n".join(summary(args.file, args.tensors)))
    elif args.command == "export":
        export(args)
    else:
        convert(args.source, args.target, args.weights)
        log.info("wrote %s", args.target)


if __name__ == "__main__":
    errors.run(main)
