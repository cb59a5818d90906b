"""Published checkpoints: their names and parameter order, and what the shapes of their weights tell of a model.

Inside, a model's parts are modules of their own (``backbone``, ``head``, ``quantizer``). Published checkpoints are
flat: their names are ours without the part. Their optimizer states list vectors and biases, which are not decayed,
before all others (:func:`util.misc.add_weight_decay`); in each group the free parameters of all parts come before any
layer's, otherwise the order is that in which modules register them. :class:`PublishedNames` translates.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from util.config import KL16_CHANNEL_ORDER, KL16_LATENT_FACTOR
from util.errors import UserError


def default_channel_order(vae_embed_dim: int, patch_size: int) -> list[int]:
    """The generation order of a token's channels where none is given: KL-16's if there are 16, else their own."""
    if vae_embed_dim == len(KL16_CHANNEL_ORDER) and patch_size == 1:
        return list(KL16_CHANNEL_ORDER)
    return list(range(vae_embed_dim * patch_size**2))


class PublishedNames(nn.Module):
    """A model whose ``state_dict`` and ``named_parameters`` have the published names and order."""

    #: Constructor arguments of each published size.
    SIZES: ClassVar[Mapping[str, Mapping[str, int]]]

    def use_published_names(self) -> None:
        """Reads and writes states under the published names from now on; to be called once all parts are there."""
        #: Our names by the published ones.
        self.ours_by_published = {name.split(".", 1)[1]: name for name in nn.Module.state_dict(self)}
        self.register_state_dict_post_hook(_to_published)
        self.register_load_state_dict_pre_hook(_from_published)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by published name, in published order."""
        members = super().named_parameters("", recurse, remove_duplicate)
        published = [(name.split(".", 1)[1], parameter) for name, parameter in members]
        for name, parameter in sorted(published, key=_layers_last):
            yield f"{prefix}.{name}" if prefix else name, parameter

    @classmethod
    def published_config(cls, weights: Any, path: str | Path) -> dict[str, Any]:
        """What the shapes of published weights, tensors by name from the file ``path``, tell of their model.

        Raises:
            UserError: they are of none of the :attr:`SIZES`.
        """
        weights = weights if isinstance(weights, Mapping) else {}
        shapes = {name: list(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
        try:
            length = shapes["output_pos_embed"][1]
            kwargs = {
                "class_num": shapes["class_emb.weight"][0],
                "quant_levels": shapes["channel_heads.0.weight"][0],
                "buffer_size": shapes["encoder_pos_embed_learned"][1] - length,
                "img_size": 16 * math.isqrt(length),
            }
            for size, sizes in cls.SIZES.items():
                with torch.device("meta"):
                    model = cls(**sizes, **kwargs)
                if all(shapes.get(name) == list(value.shape) for name, value in model.named_parameters()):
                    config = {**model.config, "model": size, "latent_factor": KL16_LATENT_FACTOR}
                    names = ImageNetInfo("imagenet-1k").label_names()  # WordNet's numbers, sorted
                    return config | ({"class_names": names} if len(names) == kwargs["class_num"] else {})
        except (KeyError, IndexError, ValueError):
            pass
        raise UserError(f"{path} does not say of what model it is, and its weights are of no published one")


def _layers_last(item: tuple[str, Any]) -> bool:
    return "." in item[0]


def _to_published(model: PublishedNames, state: dict, prefix: str, metadata: dict) -> None:
    names = sorted(model.ours_by_published.items(), key=_layers_last)
    for published, value in [(name, state.pop(prefix + ours)) for name, ours in names]:
        state[prefix + published] = value


def _from_published(model: PublishedNames, state: dict, prefix: str, *_) -> None:
    for published, ours in model.ours_by_published.items():
        if prefix + published in state:
            state[prefix + ours] = state.pop(prefix + published)
