"""Translate weight names between a model and its published files.

The names of a model are addresses in its nested modules: ``backbone.mask_token``,
``head.channel_embed``, ``quantizer.boundaries``. Published checkpoints are flat: their names lack
the first part. They list the parameters and buffers that belong directly to a part before those of
any layer; otherwise their order is the order in which modules register them. The optimizer state
has the same order within each parameter group.
"""

from collections.abc import Mapping
from typing import Any

PARTS = ("backbone", "head", "quantizer")
BACKBONE = {
    "class_emb",
    "decoder_blocks",
    "decoder_embed",
    "decoder_norm",
    "decoder_pos_embed_learned",
    "encoder_blocks",
    "encoder_norm",
    "encoder_pos_embed_learned",
    "fake_latent",
    "mask_token",
    "output_pos_embed",
    "z_proj",
    "z_proj_ln",
}
QUANTIZER = {"boundaries", "reconstruction_values"}


def to_published(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state``, a mapping from parameter and buffer names, with published names and order.

    Published names, and names of other models, stay as they are.
    """
    names = {}
    for name in state:
        part, _, rest = name.partition(".")
        names[name] = rest if part in PARTS and rest else name
    return {names[name]: state[name] for name in sorted(state, key=lambda name: "." in names[name])}


def from_published(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` with the nested names of :class:`models.tokenbridge.TokenBridge`.

    Nested names stay as they are.
    """
    return {nested_name(name): value for name, value in state.items()}


def nested_name(published: str) -> str:
    """Return the nested name of a parameter or buffer.

    Names that belong to neither backbone nor quantizer belong to the head.
    """
    first = published.split(".", 1)[0]
    if first in PARTS:
        return published
    part = "backbone" if first in BACKBONE else "quantizer" if first in QUANTIZER else "head"
    return f"{part}.{published}"
