"""Checksums of tensors and models."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from util.checkpoint.safetensors_io import tensor_bytes


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights and buffers as hex digits.

    It does not depend on the format of the file from which they were loaded.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(tensor_bytes(value.detach().cpu()))
    return digest.hexdigest()


def bit_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Return a checksum of the tensors' bits: one int64 on their device, not waited for."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = [tensor.detach().flatten() for tensor in tensors]
    sums = torch.stack([values.view(integers[values.element_size()]).sum() for values in flat])
    # Each tensor has its own large odd factor, modulo 2^64, so that changes in two tensors do not
    # cancel out.
    factors = torch.arange(1, len(sums) + 1, device=sums.device) * -7046029254386353131 | 1
    return (sums * factors).sum()


def checksum(tensors: Iterable[Tensor]) -> str:
    """Return :func:`bit_sum` as 16 hex digits. This waits for the device."""
    return f"{bit_sum(tensors).item() % 2**64:016x}"
