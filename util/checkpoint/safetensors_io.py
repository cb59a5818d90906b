"""Checkpoints as safetensors: tensors by their path, everything else as JSON beside them, checksums of both."""

import argparse
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from util.files import written_whole

SUFFIX = ".safetensors"
#: Metadata of our files: the tree that tensors hang in, and their checksums.
TREE, CHECKSUMS = "tree", "crc32"


def tensor_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, of any type."""
    return memoryview(value.contiguous().flatten().view(torch.uint8).numpy())


def checksum(value: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor_bytes(value))


def take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON can hold it; its tensors go to ``tensors`` by their path.

    Raises:
        ValueError: it holds something else than plain types, tensors and a Namespace.
    """
    if isinstance(value, Tensor):
        while path in tensors:  # names with dots in them may meet
            path += "_"
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        prefix = f"{path}." if path else ""
        return {"dict": [[key, take_tensors(each, f"{prefix}{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        each = [take_tensors(entry, f"{path}.{i}", tensors) for i, entry in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": each}
    if isinstance(value, argparse.Namespace):
        return {"namespace": take_tensors(vars(value), path, tensors)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{path} is a {type(value).__name__}, which only a program could read back")


def put_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`take_tensors`.

    Raises:
        ValueError, KeyError, TypeError: ``tree`` is not of its making.
    """
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
    """Writes a checkpoint whole or not at all; nothing of it is lost.

    Raises:
        UserError: the disk is full or the folder cannot be written.
        ValueError: see :func:`take_tensors`.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(take_tensors(content, "", tensors))
    tensors = {name: value.clone() if shared else value for name, value, shared in with_sharing(tensors)}
    checksums = json.dumps({name: checksum(value) for name, value in tensors.items()})
    with written_whole(path) as file:
        save_file(tensors, file.name, {"format": "pt", TREE: tree, CHECKSUMS: checksums})


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors alone, by their names, as every program reads them; whole or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    checksums = json.dumps({name: checksum(value) for name, value in tensors.items()})
    with written_whole(path) as file:
        save_file(tensors, file.name, {"format": "pt", CHECKSUMS: checksums})


def with_sharing(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, bool]]:
    """Names, tensors, and whether one before has the same memory, which a file cannot hold twice."""
    seen = set()
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        yield name, value, place in seen
        seen.add(place)


def read(path: str | Path) -> dict[str, Any]:
    """The checkpoint that :func:`write` wrote; of another program's file its tensors, under ``model``.

    Raises:
        ValueError and others: the file is damaged.
    """
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if CHECKSUMS in about:  # other programs write none
        sums = json.loads(about[CHECKSUMS])
        wrong = [name for name, value in tensors.items() if sums.get(name) != checksum(value)]
        if wrong:
            raise ValueError(f"the checksum of {wrong[0]} is wrong")
    return put_tensors(json.loads(about[TREE]), tensors) if TREE in about else {"model": tensors}
