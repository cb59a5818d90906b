"""All heads by name. A new head is a class in a file of its own, imported and listed here."""

from models.channel_head import ChannelHead, Head, ParallelHead
from models.masked_head import MaskedHead
from util.model_config import ModelConfig

#: Values of ``--head``.
HEADS: dict[str, type[Head]] = {
    "ar": ChannelHead,
    "parallel": ParallelHead,
    "masked": MaskedHead,
}


def build_head(config: ModelConfig) -> Head:
    """Return the head that ``config`` describes.

    Raises:
        ValueError: there is no such head, or see :class:`models.channel_head.Head`.
    """
    if config.head not in HEADS:
        raise ValueError(f"head is one of {', '.join(HEADS)}, not {config.head!r}")
    return HEADS[config.head](config)


def option_owners() -> dict[str, list[str]]:
    """Return the names of the heads that have each of the heads' own sampling options."""
    owners: dict[str, list[str]] = {}
    for name, head in HEADS.items():
        for option in head.option_names():
            owners.setdefault(option, []).append(name)
    return owners
