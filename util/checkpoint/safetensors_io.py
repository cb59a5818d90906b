"""Read and write checkpoints as safetensors files, with checksums.

Tensors are stored under their path in the nested content. The rest of the content is JSON in the
metadata of the file.
"""

import argparse
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from util.files import written_whole

SUFFIX = ".safetensors"

#: Metadata: the nested content as JSON, with paths instead of tensors.
TREE = "tree"
#: Metadata: the CRC-32 of that JSON text.
TREE_CHECKSUM = "tree_crc32"
#: Metadata: the CRC-32 of each tensor, as JSON.
CHECKSUMS = "crc32"


def tensor_bytes(value: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor of any type."""
    return value.contiguous().flatten().view(torch.uint8).numpy().data


def take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON types, with its tensors moved to ``tensors`` by their path.

    Raises:
        ValueError: ``value`` contains an object of another type.
    """
    if isinstance(value, Tensor):
        while path in tensors:  # a key with a dot may produce the path of another tensor
            path += "_"
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        prefix = f"{path}." if path else ""
        entries = [
            [key, take_tensors(entry, f"{prefix}{key}", tensors)] for key, entry in value.items()
        ]
        return {"dict": entries}
    if isinstance(value, list | tuple):
        items = [take_tensors(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, argparse.Namespace):
        return {"namespace": take_tensors(vars(value), path, tensors)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{path} is a {type(value).__name__}, which cannot be stored as data")


def put_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the content that :func:`take_tensors` converted to ``tree`` and ``tensors``.

    Raises:
        KeyError, TypeError, ValueError: ``tree`` has another form.
    """
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: put_tensors(value, tensors) for key, value in content}
    if kind == "list":
        return [put_tensors(item, tensors) for item in content]
    if kind == "tuple":
        return tuple(put_tensors(item, tensors) for item in content)
    if kind == "namespace":
        return argparse.Namespace(**put_tensors(content, tensors))
    raise ValueError(f"unknown entry {kind}")


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint completely or not at all. :func:`read` returns the same content.

    Raises:
        UserError: the disk is full or the folder cannot be written.
        ValueError: see :func:`take_tensors`.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(take_tensors(content, "", tensors))
    write_tensors(path, tensors, {TREE: tree, TREE_CHECKSUM: str(zlib.crc32(tree.encode()))})


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors by name, with checksums, completely or not at all.

    Any program that reads safetensors can read the file.
    """
    saved: dict[str, Tensor] = {}
    addresses = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        # The format does not allow tensors that share memory.
        saved[name] = value.clone() if address in addresses else value
        addresses.add(address)
    checksums = json.dumps({name: zlib.crc32(tensor_bytes(value)) for name, value in saved.items()})
    with written_whole(path) as file:
        save_file(saved, file.name, {"format": "pt", **(metadata or {}), CHECKSUMS: checksums})


def read(path: str | Path, checksums: bool = True) -> dict[str, Any]:
    """Return the content that :func:`write` stored; of other programs' files, tensors by ``model``.

    Args:
        checksums: False maps the tensors without reading them.

    Raises:
        ValueError and others: the file is damaged.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Files of other programs have no checksums.
    if checksums and CHECKSUMS in metadata:
        sums = json.loads(metadata[CHECKSUMS])
        for name, value in tensors.items():
            if sums.get(name) != zlib.crc32(tensor_bytes(value)):
                raise ValueError(f"the checksum of {name} is wrong")
    if TREE not in metadata:
        return {"model": tensors}
    tree = metadata[TREE]
    # Files of earlier versions have no checksum of the tree.
    tree_checksum = str(zlib.crc32(tree.encode()))
    if metadata.get(TREE_CHECKSUM, tree_checksum) != tree_checksum:
        raise ValueError("the checksum of its metadata is wrong")
    return put_tensors(json.loads(tree), tensors)
