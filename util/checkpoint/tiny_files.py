"""Files of tiny autoencoders (TAESD and its siblings): pairs of files, and weights of diffusers.

Their author publishes an encoder and a decoder, such as ``taef2_encoder.pth`` and
``taef2_decoder.pth``. A folder of diffusers' ``AutoencoderTiny`` holds both in one file.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from util.checkpoint import hub, safetensors_io
from util.checkpoint.files import locate, read_checkpoint
from util.errors import UserError, some
from util.model_config import TINY_CONFIG

#: Names of the two files of a pair.
PAIR = re.compile(r"(?P<name>.+)_(?:encoder|decoder)(?P<suffix>\.pth|\.safetensors)")
PARTS = ("encoder", "decoder")
#: Diffusers' name of the class, the start of its weights' names, and settings that are supported.
DIFFUSERS_CLASS, DIFFUSERS_LAYERS = "AutoencoderTiny", "encoder.layers."
DIFFUSERS_SETTINGS = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}


def pair_of(path: Path) -> tuple[Path, Path] | None:
    """Return encoder and decoder if ``path`` has the name of one of them, otherwise None."""
    match = PAIR.fullmatch(path.name)
    if match is None:
        return None
    encoder, decoder = (
        path.with_name(f"{match['name']}_{part}{match['suffix']}") for part in PARTS
    )
    return encoder, decoder


def locate_tokenizer(path: str | Path, names: Sequence[str]) -> Path:
    """Return :func:`util.checkpoint.files.locate`, or one file of the pair in folder ``path``.

    Raises:
        UserError: the folder holds several pairs; or the Hub does not have the file.
    """
    found = locate(path, names)
    if hub.is_address(path):
        for file in pair_of(found) or ():
            hub.fetch_beside(path, found, file.name)
    elif Path(path).is_dir() and not found.is_file():
        files = [file for file in sorted(Path(path).iterdir()) if pair_of(file)]
        if len({pair_of(file) for file in files}) > 1:
            listed = some([file.name for file in files])
            raise UserError(
                f"{path} contains several tokenizers: {listed}; pass one of these files"
            )
        found = files[0] if files else found
    return found


def read_pair(pair: tuple[Path, Path]) -> dict[str, Any]:
    """Return the weights in the two files of :func:`pair_of`, under our names.

    Raises:
        UserError: one of the files is missing, or :func:`read_checkpoint` cannot read it.
    """
    weights = {}
    for part, path, other in zip(PARTS, pair, reversed(pair), strict=True):
        if other.is_file() and not path.is_file():
            raise UserError(f"{other} needs its {part}, {path.name}, in the same folder")
        content = read_checkpoint(path)
        content = content["model"] if path.suffix == safetensors_io.SUFFIX else content
        weights |= {f"{part}.{name}": value for name, value in content.items()}
    return weights


def from_diffusers(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights of diffusers under our names; its decoder does not number the clamp."""

    def renamed(name: str) -> str:
        part, _, number, *rest = name.split(".")
        return ".".join([part, str(int(number) + (part == "decoder")), *rest])

    return {
        renamed(name) if re.match(r"(en|de)coder\.layers\.\d", name) else name: value
        for name, value in weights.items()
    }


def tiny_config(weights: Mapping[str, Any], path: str | Path, beside: Any = None) -> dict[str, Any]:
    """Return the description of a tiny autoencoder: its arguments and its latent factor.

    Args:
        weights: under our names.
        path: the file, for messages.
        beside: content of the ``config.json`` of diffusers, if there is one.

    Raises:
        UserError: encoder and decoder do not fit each other, or the architecture is another one.
    """
    beside = beside if isinstance(beside, Mapping) else {}
    unsupported = {
        name: beside[name]
        for name, value in DIFFUSERS_SETTINGS.items()
        if beside.get(name, value) != value
    }
    if unsupported:
        raise UserError(
            f"{path} is an {DIFFUSERS_CLASS} with {unsupported}, which is not supported"
        )
    encoder, decoder = weights.get("encoder.14.weight"), weights.get("decoder.1.weight")
    if not all(isinstance(value, Tensor) and value.ndim == 4 for value in (encoder, decoder)):
        raise UserError(f"{path} is not a tiny autoencoder of stride 8 like TAESD or TAEF2")
    if encoder.shape[0] != decoder.shape[1]:
        raise UserError(
            f"{path}: the encoder has {encoder.shape[0]} latent channels, the decoder "
            f"{decoder.shape[1]}; use the two files of one tokenizer"
        )
    arguments = {
        "embed_dim": decoder.shape[1],
        "ch": decoder.shape[0],
        "pooled": any(".pool." in name for name in weights),
        "shift": beside.get("shift_factor", 0.0),
    }
    return {"vae": {**TINY_CONFIG, **arguments}, "latent_factor": beside.get("scaling_factor", 1.0)}
