"""Layers that the backbone and the heads share: dropout, attention, MLP, and the backbone's block.

Each chooses the fastest implementation for the device of its input. Results are equal up to
rounding, and up to the entries that dropout draws.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from util.model_config import ModelConfig


def gather_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Return the rows of ``x [B, L, D]`` at ``positions [B, N]``: ``[B, N, D]``."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


# --------------------------------------------------------------------------------------------------
# Dropout. On the CPU, PyTorch draws random numbers one by one in one thread: an eighth of a
# training step.

RESOLUTION = 2**16


class DropBits(torch.autograd.Function):
    """Zero entries where 16 random bits fall below a threshold, and scale the others.

    Saves one byte per entry for the backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        threshold = round(p * RESOLUTION)
        # The seed comes from torch's generator, so that seeding or restoring it decides the masks.
        seed = int(torch.randint(2**62, ()))
        words = -(-x.numel() // 4)
        generator = np.random.Generator(np.random.SFC64(seed))
        bits = generator.integers(0, 2**64, size=words, dtype=np.uint64)
        bits = torch.from_numpy(bits.view(np.int16))[: x.numel()].view(x.shape)
        kept = bits >= threshold - RESOLUTION // 2
        ctx.save_for_backward(kept)
        ctx.scale = RESOLUTION / (RESOLUTION - threshold)  # of the rounded probability: no bias
        return (x * kept.to(x.dtype)).mul_(ctx.scale)  # vectorized, unlike masked_fill

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (grad * kept.to(grad.dtype)).mul_(ctx.scale), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero entries of ``x`` with probability ``p`` in [0, 1]; scale others by ``1 / (1 - p)``.

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


# --------------------------------------------------------------------------------------------------
# Attention over at most some hundred positions. On CUDA, PyTorch's fused kernel is fastest. On the
# CPU, plain products are: the fused kernel is 2 to 8 times slower there, most of all its bf16
# backward pass.

#: Largest M x H in a call of the fused kernel: CUDA's limit for two axes of a grid, unchecked in
#: some versions.
LAUNCH_ROWS = 2**16 - 1


def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, drop: float) -> Tensor:
    """Compute :func:`attend` by PyTorch's fused kernel, :data:`LAUNCH_ROWS` rows at a time."""
    kernel = partial(F.scaled_dot_product_attention, dropout_p=drop, is_causal=causal)
    rows = LAUNCH_ROWS // q.shape[1]
    if len(q) <= rows:
        return kernel(q, k, v)
    parts = zip(*(x.split(rows) for x in (q, k, v)), strict=True)
    return torch.cat([kernel(*part) for part in parts])


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0
) -> Tensor:
    """Compute softmax attention with scale 1/sqrt(d).

    Args:
        q, k, v: queries, keys and values ``[M, H, N, d]``.
        mask: ``[N, N]``, the causal mask of 0 and -inf; no other is possible.
        drop: dropout of the attention weights.
    """
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
        """Attend over ``x [B, S, D]`` from all positions, or from ``rows [B, N]`` only."""
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


# --------------------------------------------------------------------------------------------------
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

    def flops(self, positions: float) -> float:
        """Count the operations of the forward pass at ``positions`` positions."""
        return 2 * positions * 2 * self.fc1.in_features * self.fc1.out_features


def block_flops(dim: int, mlp: Mlp, positions: float) -> float:
    """Count the operations of attention and MLP over ``positions`` positions of width ``dim``.

    Only matrix products count, with 2 operations per multiply-add.
    """
    attention = 2 * positions * 4 * dim**2 + 4 * positions**2 * dim
    return attention + mlp.flops(positions)


class Block(nn.Module):
    """Pre-norm transformer block, with the parameters of timm's ViT ``Block``."""

    def __init__(self, dim: int, num_heads: int, config: ModelConfig):
        super().__init__()
        self.norm1 = config.norm_layer(dim)
        self.attn = Attention(dim, num_heads, config.attn_dropout, config.proj_dropout)
        self.norm2 = config.norm_layer(dim)
        self.mlp = Mlp(dim, config.mlp_ratio, config.proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x [B, S, D]``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def at(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the output for ``x [B, S, D]`` only at ``rows [B, N]``: ``[B, N, D]``."""
        x = gather_tokens(x, rows) + self.attn(self.norm1(x), rows)
        return x + self.mlp(self.norm2(x))

    def flops(self, positions: float) -> float:
        """Count the operations of the forward pass over ``positions`` positions."""
        return block_flops(self.attn.proj.in_features, self.mlp, positions)
