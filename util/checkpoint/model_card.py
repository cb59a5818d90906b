"""The card, ``README.md``, of a model's folder or repository: its sizes, its metrics, an example of its use."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from util.checkpoint import hub
from util.config import KL16_LATENT_FACTOR
from util.metrics.tables import METRIC_TITLES
from util.tables import markdown

#: The card's template.
CARD = Path(__file__).with_suffix(".md")
#: Settings of an evaluation that its metrics depend on, besides the head's own sampling options.
SETTINGS = ("num_images", "num_iter", "cfg", "cfg_schedule", "temperature", "order", "precision")


def model_card(
    model: Any,
    data: ModelCardData,
    repo_id: str = "owner/repo",
    tokenizer: str | None = None,
    figures: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> ModelCard:
    """The card of a TokenBridge.

    Args:
        model: a :class:`models.tokenbridge.TokenBridge`.
        data: what the Hub shows beside the card.
        repo_id: where the card's example loads the model from.
        tokenizer: where it loads the tokenizer from; by default the published KL-16, if the latent factors agree.
        figures: content of a ``samples.json`` of ``main_tokenbridge.py``: metrics, and the settings of the evaluation.
        licence: of the weights, by the Hub's short name, such as ``mit``.
    """
    data = copy.deepcopy(data)
    data.license = licence
    if tokenizer is None:
        kl16 = (
            model.config["vae_embed_dim"] == 16
            and model.metadata.get("latent_factor") == KL16_LATENT_FACTOR
        )
        tokenizer = f"hf://{hub.VAE_REPO}/kl16.ckpt" if kl16 else "path/to/its/tokenizer"
    return ModelCard.from_template(
        data,
        template_path=str(CARD),
        title=repo_id.rpartition("/")[2] or repo_id,
        repo_id=repo_id,
        tokenizer=tokenizer,
        images=min(8, model.class_num),
        sizes=sizes_table(model),
        figures=figures_table(figures or {}, [*SETTINGS, *model.head.option_names()]),
        licence=f"{licence}." if licence else "Not stated: ask whoever trained it.",
    )


def sizes_table(model: nn.Module) -> str:
    """A table of the model's sizes."""
    c = model.config
    rows = [
        ["parameters", f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"],
        ["image", f"{c['img_size']} x {c['img_size']} pixels, {c['class_num']} classes"],
        [
            "tokens",
            f"{model.seq_len} of {model.token_dim} channels, {c['quant_levels']} levels each",
        ],
        [
            "backbone",
            f"{c['encoder_depth']} + {c['decoder_depth']} blocks of width {c['encoder_embed_dim']}",
        ],
        ["head", f"{c['head']}, {c['channel_depth']} blocks of width {c['channel_embed_dim']}"],
        ["latent factor", model.metadata.get("latent_factor") or "the tokenizer's"],
    ]
    return markdown(["", ""], rows)


def figures_table(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return a table of an evaluation's metrics and the settings ``names``; empty if there are no metrics."""
    metrics = [[title, figures[name]] for name, title in METRIC_TITLES.items() if name in figures]
    settings = figures.get("settings", {})
    rows = metrics + [[name, settings[name]] for name in names if settings.get(name) is not None]
    return markdown(["metric", "value"], rows) if metrics else ""
