"""Shows, converts and exports checkpoints: ``python -m tools.checkpoint show|convert|export``."""

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

#: Files to look for in a folder of a model or tokenizer, in this order.
CONTENT_NAMES = (CHECKPOINT_NAME, SAFE_NAME, *VAE_NAMES)
#: Names of weights that only tokenizers have: KL-16 and its like, and tiny autoencoders.
TOKENIZER_WEIGHTS = ("post_quant_conv.weight", "decoder.1.weight")


def read_content(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, or the weights of both files of a tiny autoencoder.

    Raises:
        UserError: see :func:`util.checkpoint.files.read_checkpoint`.
    """
    pair = pair_of(path)
    return {"model": read_pair(pair)} if pair else read_checkpoint(path)


def convert(source: str | Path, target: str | Path, weights: str | None = None) -> None:
    """Writes a checkpoint in the format that the suffix of ``target`` names, ``.safetensors`` or ``.pth``.

    With ``weights``, ``"model"`` or ``"model_ema"``, only those and the quantizer's tables are written.

    Raises:
        UserError: see :func:`util.checkpoint.files.read_checkpoint`; ``target`` has another suffix or exists; there are no such weights.
    """
    target = Path(target)
    if target.suffix not in (safetensors_io.SUFFIX, ".pth", ".ckpt"):
        raise UserError(f"{target}: choose a name that ends in {safetensors_io.SUFFIX} or .pth")
    if target.exists():
        raise UserError(f"{target} is there already; choose another name")
    content = read_checkpoint(source)
    if weights is not None:
        if not isinstance(content.get(weights), Mapping):
            raise UserError(f"{source} has no weights under '{weights}'")
        tables = content.get("model")
        content = {
            "model": {**(tables if isinstance(tables, Mapping) else {}), **content[weights]},
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
    """Lines that describe what is in a checkpoint; with ``tensors`` one for every tensor, too."""
    path = locate_tokenizer(path, CONTENT_NAMES)
    content = read_content(path)
    if "config" not in content and (config := config_beside(path)):
        content["config"] = config
    size = sum(file.stat().st_size for file in pair_of(path) or [path])
    lines = [f"{path}: {size / 2**20:,.1f} MiB"]
    for name, value in content.items():
        if (
            isinstance(value, Mapping)
            and value
            and all(isinstance(each, Tensor) for each in value.values())
        ):
            count = sum(each.numel() for each in value.values())
            kinds = ", ".join(
                sorted({str(each.dtype).removeprefix("torch.") for each in value.values()})
            )
            lines.append(f"{name}: {len(value)} tensors, {count / 1e6:,.2f}M values, {kinds}")
            lines += [
                f"    {each} {list(tensor.shape)} {tensor.dtype}"
                for each, tensor in value.items()
                if tensors
            ]
        elif name == "optimizer" and isinstance(value, Mapping):
            lines.append(f"{name}: moments of {len(value.get('state', {}))} parameters")
        elif isinstance(value, Mapping | argparse.Namespace):
            entries = value if isinstance(value, Mapping) else vars(value)
            lines += [
                f"{name}:",
                *(f"    {key}: {shortened(each)}" for key, each in entries.items()),
            ]
        else:
            lines.append(f"{name}: {shortened(value)}")
    return lines


def shortened(value: Any) -> str:
    """A value in at most 100 characters."""
    text = f"tensor {list(value.shape)}" if isinstance(value, Tensor) else str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def export(args: argparse.Namespace) -> None:
    """Writes a folder that ``from_pretrained`` reads, and uploads it with ``--push_to_hub``."""
    folder = Path(args.folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is there already; choose another folder")
    source = locate_tokenizer(args.source, CONTENT_NAMES)
    if "_class_name" in (config_beside(source) or {}):
        raise UserError(
            f"{source} is a tokenizer of diffusers already, which from_pretrained reads as it is"
        )
    content = read_content(source)
    place = hub.Address(args.push_to_hub or "", None, "")
    if args.push_to_hub:  # first, so that nothing is written if it fails
        with hub.explained(place, "write to"):
            hub.make_repo(args.push_to_hub, args.private)
    weights = content.get("model") or content.get("state_dict") or content
    if any(name in weights for name in TOKENIZER_WEIGHTS):
        vae, latent_factor = AutoencoderKL.from_pretrained(source)
        if args.figures or args.licence or args.tokenizer:
            raise UserError(
                f"{source} is a tokenizer: --figures, --licence and --tokenizer are for a model's card"
            )
        save_vae_folder(folder, vae, latent_factor)
    else:
        figures = read_json(args.figures) if args.figures else None
        if args.figures and not (isinstance(figures, dict) and set(METRIC_TITLES) & set(figures)):
            hint = "name the samples.json of an evaluation that measured some"
            raise UserError(f"{args.figures} holds no metrics: {hint}")
        card = {"figures": figures, "licence": args.licence, "tokenizer": args.tokenizer}
        card["repo_id"] = args.push_to_hub or str(folder)
        model = TokenBridge.from_content(
            check_run(content, source), source, False if args.no_ema else None
        )
        model.save_pretrained(folder, model_card_kwargs=card)
    log.info("wrote %s, of %s", folder, source)
    if args.push_to_hub:
        with hub.explained(place, "write to"):
            print(HfApi().upload_folder(repo_id=args.push_to_hub, folder_path=folder))


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    text = "Shows what is in a checkpoint, converts between .pth and .safetensors without loss, exports models."
    parser = new_parser(text, "tools.checkpoint", config=False)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what is in a file")
    show.add_argument("file", help="a checkpoint, its folder, or an address on the Hub")
    show.add_argument("--tensors", action="store_true", help="every tensor, too")
    change = commands.add_parser("convert", help="from .pth to .safetensors, or back")
    change.add_argument("source", help="file to read")
    change.add_argument("target", help="file to write; its ending says in which format")
    change.add_argument(
        "--weights", choices=["model", "model_ema"], help="these alone; by default everything"
    )
    text = "a model or tokenizer to a folder that from_pretrained reads, or the Hub"
    export = commands.add_parser("export", help=text)
    export.add_argument(
        "source", help="a checkpoint, its folder, a tokenizer, or an address on the Hub"
    )
    export.add_argument(
        "folder", help="where to write model.safetensors, config.json and a model card"
    )
    export.add_argument(
        "--no_ema", action="store_true", help="the weights themselves, not their average"
    )
    export.add_argument("--figures", help="samples.json of an evaluation, for the model card")
    export.add_argument("--licence", help="of the weights, for the model card, such as mit")
    export.add_argument("--tokenizer", help="where its tokenizer lies, for the model card")
    export.add_argument(
        "--push_to_hub", metavar="OWNER/REPO", help="also upload it there; made if there is none"
    )
    export.add_argument("--private", action="store_true", help="make that repository a private one")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
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
