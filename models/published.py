"""Published checkpoints: the configuration that shapes show, and loading by published names.

The mapping of names is in :mod:`util.checkpoint.names`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.checkpoint.names import from_published, nested_name, to_published
from util.errors import UserError
from util.model_config import KL16_LATENT_FACTOR

__all__ = ["accept_published_names", "from_published", "published_config", "to_published"]


def accept_published_names(
    model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Rename published entries of ``state`` before loading (a ``load_state_dict`` pre-hook)."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + nested_name(name.removeprefix(prefix))] = state.pop(name)


def imagenet_names() -> list[str]:
    """Return the WordNet ids of ImageNet's 1,000 classes in the order of their labels."""
    from timm.data import ImageNetInfo  # imported here since it loads torchvision

    return ImageNetInfo("imagenet-1k").label_names()


def published_config(model_class: Any, weights: Any, path: str | Path) -> dict[str, Any]:
    """Return the configuration of the published model that has the shapes of ``weights``.

    Args:
        model_class: :class:`models.tokenbridge.TokenBridge`.
        weights: tensors by name, read from the file ``path``.

    Raises:
        UserError: no model of ``model_class.SIZES`` has such weights.
    """
    weights = to_published(weights) if isinstance(weights, Mapping) else {}
    shapes = {
        name: list(value.shape) for name, value in weights.items() if isinstance(value, Tensor)
    }
    try:
        length = shapes["output_pos_embed"][1]
        kwargs = {
            "class_num": shapes["class_emb.weight"][0],
            "quant_levels": shapes["channel_heads.0.weight"][0],
            "buffer_size": shapes["encoder_pos_embed_learned"][1] - length,
            "img_size": 16 * math.isqrt(length),
        }
        for size, sizes in model_class.SIZES.items():
            with torch.device("meta"):
                model = model_class(**{**sizes, **kwargs})
            expected = to_published(dict(model.named_parameters()))
            if all(shapes.get(name) == list(value.shape) for name, value in expected.items()):
                config = {**model.config, "model": size, "latent_factor": KL16_LATENT_FACTOR}
                names = imagenet_names()
                if len(names) == kwargs["class_num"]:
                    config["class_names"] = names
                return config
    except (KeyError, IndexError, ValueError):
        pass
    raise UserError(
        f"{path} stores no config, and its weights have the shapes of no published model"
    )
