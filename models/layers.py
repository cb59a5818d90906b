"""Layers that the backbone and the heads share: dropout, attention, MLP, and the backbone's block.

Each picks the way that is fastest on the device of its input. Results are equal up to rounding, and
up to the entries that dropout draws.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def gather_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of ``x [B, L, D]`` at ``positions [B, N]``: ``[B, N, D]``."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


# --------------------------------------------------------------------------------------------------------------------
# Dropout. On the CPU PyTorch draws random numbers one by one, in one thread: an eighth of a training step.

RESOLUTION = 2**16


class DropBits(torch.autograd.Function):
    """Zeroes entries where 16 random bits fall below a threshold, and scales the others; keeps one byte an entry."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        threshold = round(p * RESOLUTION)
        # The seed comes from torch's generator: whoever seeds, saves or restores that one decides the masks.
        seed = int(torch.randint(2**62, ()))
        words = -(-x.numel() // 4)
        bits = np.random.Generator(np.random.SFC64(seed)).integers(
            0, 2**64, size=words, dtype=np.uint64
        )
        bits = torch.from_numpy(bits.view(np.int16))[: x.numel()].view(x.shape)
        kept = bits >= threshold - RESOLUTION // 2
        ctx.save_for_backward(kept)
        ctx.scale = RESOLUTION / (
            RESOLUTION - threshold
        )  # of the probability as rounded: nothing is biased
        return (x * kept.to(x.dtype)).mul_(
            ctx.scale
        )  # products are vectorized, filling by a mask is not

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
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return DropBits.apply(x, p)


class Dropout(nn.Dropout):
    """PyTorch's dropout module, computed by :func:`dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


# --------------------------------------------------------------------------------------------------------------------
# Attention over at most some hundred positions. On CUDA PyTorch's fused kernel is fastest. On the CPU plain products
# are: the fused kernel is 2 to 8 times slower there, most of all its bf16 backward pass.

#: Most M x H in a call of the fused kernel: CUDA's limit for two of a grid's axes, which some versions do not look at.
LAUNCH_ROWS = 2**16 - 1


def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, drop: float) -> Tensor:
    """:func:`attend` by PyTorch's kernel, :data:`LAUNCH_ROWS` at a time."""
    kernel, rows = (
        partial(F.scaled_dot_product_attention, dropout_p=drop, is_causal=causal),
        LAUNCH_ROWS // q.shape[1],
    )
    if len(q) <= rows:
        return kernel(q, k, v)
    return torch.cat(
        [kernel(*part) for part in zip(*(x.split(rows) for x in (q, k, v)), strict=True)]
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0
) -> Tensor:
    """Softmax attention ``[M, H, N, d]`` with scale 1/sqrt(d); a ``mask [N, N]`` must be the causal one."""
    if q.is_cuda:
        return fused(q, k, v, mask is not None, drop)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return dropout(scores.softmax(dim=-1), drop) @ v


class Attention(nn.Module):
    """Multi-head self-attention, with the parameters of timm's ``Attention``."""

    def __init__(self, dim: int, num_heads: int, attn_dropout: float, proj_dropout: float):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of its {num_heads} attention heads")
        self.num_heads, self.attn_dropout = num_heads, attn_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(proj_dropout)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Attend over ``x [B, S, D]`` from all positions, or from ``rows [B, N]`` alone: ``[B, N, D]``."""
        if rows is None:
            parts = self.qkv(x).chunk(3, dim=-1)
        else:
            width = x.shape[-1]
            query = F.linear(gather_tokens(x, rows), self.qkv.weight[:width], self.qkv.bias[:width])
            parts = (
                query,
                *F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, dim=-1),
            )
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts)
        out = attend(q, k, v, drop=self.attn_dropout if self.training else 0.0)
        return self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))


# --------------------------------------------------------------------------------------------------------------------
# MLP and block.


class Mlp(nn.Module):
    """Linear, exact GELU, Linear, each followed by dropout."""

    def __init__(self, dim: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block, with the parameters of timm's ViT ``Block``."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        norm_layer: Callable,
        attn_dropout: float,
        proj_dropout: float,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, attn_dropout, proj_dropout)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, mlp_ratio, proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, S, D]``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def at(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the output for ``x [B, S, D]`` at the positions ``rows [B, N]`` alone: ``[B, N, D]``."""
        x = gather_tokens(x, rows) + self.attn(self.norm1(x), rows)
        return x + self.mlp(self.norm2(x))
