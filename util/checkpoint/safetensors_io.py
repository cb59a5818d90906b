"""Checkpoints as safetensors files: tensors by their path, everything else as JSON in the metadata, checksums."""

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
#: Entries of our files' metadata: the nested content with paths in the tensors' places, the CRC-32 of that text, and
#: those of the tensors.
TREE, TREE_CHECKSUM, CHECKSUMS = "tree", "tree_crc32", "crc32"


def tensor_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, of any type."""
    return value.contiguous().flatten().view(torch.uint8).numpy().data


def take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON can hold it, its tensors put into ``tensors`` by path; ValueError if it holds other objects."""
    if isinstance(value, Tensor):
        while path in tensors:  # a key with a dot may give the path of another tensor
            path += "_"
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        prefix = f"{path}." if path else ""
        return {
            "dict": [
                [key, take_tensors(each, f"{prefix}{key}", tensors)] for key, each in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        each = [take_tensors(entry, f"{path}.{i}", tensors) for i, entry in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": each}
    if isinstance(value, argparse.Namespace):
        return {"namespace": take_tensors(vars(value), path, tensors)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{path} is a {type(value).__name__}, which only a program could read back")


def put_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`take_tensors`; KeyError, TypeError or ValueError for another ``tree``."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: put_tensors(value, tensors) for key, value in content}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(put_tensors(each, tensors) for each in content)
    if kind == "namespace":
        return argparse.Namespace(**put_tensors(content, tensors))
    raise ValueError(f"unknown entry {kind}")


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all, so that :func:`read` gives all of it back.

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
    """Writes tensors under their names, with their checksums, whole or not at all; any program can read them."""
    saved, places = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        saved[name] = (
            value.clone() if place in places else value
        )  # the format refuses tensors that share memory
        places.add(place)
    checksums = json.dumps({name: zlib.crc32(tensor_bytes(value)) for name, value in saved.items()})
    with written_whole(path) as file:
        save_file(saved, file.name, {"format": "pt", **(metadata or {}), CHECKSUMS: checksums})


def read(path: str | Path, checksums: bool = True) -> dict[str, Any]:
    """What :func:`write` wrote, or another program's tensors under ``model``; ValueError or others if damaged.

    Without ``checksums`` tensors are mapped, and not read.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if checksums and CHECKSUMS in metadata:  # other programs write none
        sums = json.loads(metadata[CHECKSUMS])
        for name, value in tensors.items():
            if sums.get(name) != zlib.crc32(tensor_bytes(value)):
                raise ValueError(f"the checksum of {name} is wrong")
    if TREE not in metadata:
        return {"model": tensors}
    # Files of earlier versions have no checksum of the text.
    if TREE_CHECKSUM in metadata and metadata[TREE_CHECKSUM] != str(
        zlib.crc32(metadata[TREE].encode())
    ):
        raise ValueError("the checksum of its description is wrong")
    return put_tensors(json.loads(metadata[TREE]), tensors)
