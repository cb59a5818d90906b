"""Published names and order of a model's weights, translated where files are read and written.

A model's names are addresses in its nested modules: ``backbone.mask_token``, ``head.channel_embed``,
``quantizer.boundaries``. Published checkpoints are flat: their names lack the part. They list the
free parameters and buffers of all parts before any layer's; otherwise their order is that in which
modules register them. Their optimizer states follow the same order within each parameter group.
"""

from collections.abc import Mapping
from typing import Any

PARTS = ("backbone", "head", "quantizer")
BACKBONE = {
    "class_emb", "decoder_blocks", "decoder_embed", "decoder_norm", "decoder_pos_embed_learned", "encoder_blocks",
    "encoder_norm", "encoder_pos_embed_learned", "fake_latent", "mask_token", "output_pos_embed", "z_proj", "z_proj_ln",
}  # fmt: skip
QUANTIZER = {"boundaries", "reconstruction_values"}


def to_published(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state``, anything by parameter or buffer name, under the published names and in their order.

    Names that are published already, and those of other models, stay as they are.
    """
    names = {
        name: name.split(".", 1)[1] if name.split(".", 1)[0] in PARTS else name for name in state
    }
    return {names[name]: state[name] for name in sorted(state, key=lambda name: "." in names[name])}


def from_published(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` under the names of :class:`models.tokenbridge.TokenBridge`; nested ones stay as they are."""
    return {nested_name(name): value for name, value in state.items()}


def nested_name(published: str) -> str:
    """Return the address of a parameter or buffer in the model; heads own every name that no other part has."""
    first = published.split(".", 1)[0]
    if first in PARTS:
        return published
    part = "backbone" if first in BACKBONE else "quantizer" if first in QUANTIZER else "head"
    return f"{part}.{published}"
