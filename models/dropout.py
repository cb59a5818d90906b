"""Dropout that does not wait for random numbers: on the CPU PyTorch draws them one by one, in one thread."""

import numpy as np
import torch
from torch import Tensor, nn

RESOLUTION = 2**16


class DropBits(torch.autograd.Function):
    """Zeroes entries where 16 random bits fall below a threshold, and scales the others; keeps one byte an entry."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        threshold = round(p * RESOLUTION)
        # The seed comes from torch's generator: whoever seeds, saves or restores that one decides the masks.
        seed = int(torch.randint(2**62, ()))
        words = -(-x.numel() // 4)
        bits = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, size=words, dtype=np.uint64)
        bits = torch.from_numpy(bits.view(np.int16))[: x.numel()].view(x.shape)
        kept = bits >= threshold - RESOLUTION // 2
        ctx.save_for_backward(kept)
        ctx.scale = RESOLUTION / (RESOLUTION - threshold)  # of the probability as rounded: nothing is biased
        return (x * kept.to(x.dtype)).mul_(ctx.scale)  # products are vectorized, filling by a mask is not

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (grad * kept.to(grad.dtype)).mul_(ctx.scale), None


def dropout(x: Tensor, p: float) -> Tensor:
    """``x`` with each entry zeroed with probability ``p``, in [0, 1], the others scaled by ``1 / (1 - p)``.

    On the CPU ``p`` is rounded to a multiple of 2^-16.
    """
    if p == 0:
        return x
    if round(p * RESOLUTION) >= RESOLUTION:
        return x * 0
    if x.is_cuda or torch.compiler.is_compiling():
        return nn.functional.dropout(x, p)
    return DropBits.apply(x, p)


class Dropout(nn.Dropout):
    """``nn.Dropout`` by :func:`dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def with_fast_dropout(module: nn.Module) -> nn.Module:
    """``module`` itself, every ``nn.Dropout`` in it replaced."""
    for part in module.modules():
        for name, child in part.named_children():
            if type(child) is nn.Dropout:
                setattr(part, name, Dropout(child.p))
    return module
