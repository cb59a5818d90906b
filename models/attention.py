"""Softmax attention, by the kernel that is fastest for short sequences on the device at hand."""

import torch.nn.functional as F
from torch import Tensor

from models.dropout import dropout


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0) -> Tensor:
    """Softmax attention ``[M, H, N, d]`` with scale 1/sqrt(d); ``mask [N, N]`` is added to the scores.

    On the CPU as plain products: PyTorch's fused kernel is 2 to 8 times slower there on sequences this short, most of
    all its bf16 backward pass.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=mask is not None)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return dropout(scores.softmax(dim=-1), drop) @ v
