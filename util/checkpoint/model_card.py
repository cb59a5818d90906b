"""The model card (``README.md``) of a folder or repository: sizes, metrics, example of use."""

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
    """Return the model card of a TokenBridge.

    Args:
        model: a :class:`models.tokenbridge.TokenBridge`.
        data: metadata that the Hub shows.
        repo_id: path or repository of the model, for the example in the card.
        tokenizer: path or address of the tokenizer, for the example; by default the published
            KL-16, if the latent factors agree, and otherwise the folder ``vae`` beside the model.
        figures: content of a ``samples.json``: metrics and settings of an evaluation.
        licence: of the weights, by the Hub's short name, such as ``mit``.
    """
    data = copy.deepcopy(data)
    data.license = licence
    if tokenizer is None:
        kl16 = (
            model.config["vae_embed_dim"] == 16
            and model.metadata.get("latent_factor") == KL16_LATENT_FACTOR
        )
        tokenizer = f"hf://{hub.VAE_REPO}/kl16.ckpt" if kl16 else None
    return ModelCard.from_template(
        data,
        template_path=str(CARD),
        title=repo_id.rpartition("/")[2] or repo_id,
        repo_id=repo_id,
        tokenizer=tokenizer,
        channels=" one after the other" if model.config["head"] == "ar" else "",
        images=min(8, model.class_num),
        cfg=3.0 if model.class_num > 1 else 1.0,
        sizes=sizes_table(model),
        figures=figures_table(figures or {}, [*SETTINGS, *model.head.option_names()]),
        licence=f"{licence}." if licence else "Not stated. Ask the authors of the model.",
    )


def sizes_table(model: nn.Module) -> str:
    """Return a table of the model's sizes."""
    config = model.config
    size = config["img_size"]
    depths = f"{config['encoder_depth']} + {config['decoder_depth']}"
    head_size = f"{config['channel_depth']} blocks of width {config['channel_embed_dim']}"
    levels = config["quant_levels"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows: list[list[Any]] = [
        ["parameters", f"{parameters / 1e6:.1f}M"],
        ["image", f"{size} x {size} pixels"],
        ["classes", config["class_num"]],
        ["tokens", f"{model.seq_len} of {model.token_dim} channels, {levels} levels each"],
        ["backbone", f"{depths} blocks of width {config['encoder_embed_dim']}"],
        ["head", f"{config['head']}, {head_size}"],
        ["latent factor", model.metadata.get("latent_factor") or "the tokenizer's"],
    ]
    return markdown(["", ""], rows)


def figures_table(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return a table of metrics and the settings ``names``; empty if there are no metrics."""
    metrics = [[title, figures[name]] for name, title in METRIC_TITLES.items() if name in figures]
    settings = figures.get("settings", {})
    rows = metrics + [[name, settings[name]] for name in names if settings.get(name) is not None]
    return markdown(["metric", "value"], rows) if metrics else ""
