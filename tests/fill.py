"""Fills a state dict with reproducible pseudo-random values.

The vectors in reference/ were computed with weights filled by
``deterministic_fill``; fill the model under test in the same way and its
outputs must match theirs.

The fill depends on each entry's *published* name and shape only (the names in
``state_dict_*.json``), never on the order in which modules are created.
"""

import re
import zlib

import numpy as np
import torch

#: Buffers that are computed, not learned: left as the model built them.
COMPUTED = ("channel_mask", "reconstruction_values", "boundaries")


def deterministic_values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values for the entry ``name`` of shape ``shape``, float32.

    Norm gains are drawn around 1, biases and other vectors around 0, matrices
    and kernels with standard deviation 1/sqrt(fan_in), embeddings with 1,
    free parameters (position embeddings, mask token, ...) with 0.3, and the
    class logits' weights with 4/sqrt(fan_in) so that an argmax has clear winners.
    """
    random = np.random.RandomState(zlib.crc32(name.encode()) % 2**32)
    values = random.standard_normal(shape).astype(np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if re.fullmatch(r"class_emb\.weight|token_embeddings(\.\d+)?\.weight", name):
        pass
    elif leaf == "weight" and len(shape) == 1:
        values = 1 + 0.05 * values
    elif leaf == "weight":
        gain = 4 if name.startswith("channel_heads.") else 1
        values *= gain / np.sqrt(np.prod(shape[1:]))
    elif leaf == "bias":
        values *= 0.05
    else:
        values *= 0.3
    return torch.from_numpy(np.ascontiguousarray(values))


def deterministic_fill(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of ``state_dict`` (published names) with every learned entry replaced."""
    return {
        name: value.clone()
        if name in COMPUTED
        else deterministic_values(name, tuple(value.shape)).to(value.dtype)
        for name, value in state_dict.items()
    }
