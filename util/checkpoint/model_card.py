"""The card, ``README.md``, of a model's folder or repository: what it is, its figures, how to use it."""

import copy
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from util.checkpoint import hub
from util.config import KL16_LATENT_FACTOR
from util.metrics import TITLES
from util.tables import markdown

PAPER = "https://arxiv.org/abs/2503.16430"

CARD = """---
{{ card_data }}
---

# {{ title }}

An image generator of the kind of TokenBridge: a tokenizer's continuous latents, quantized after training, dimension by
dimension, are predicted as discrete tokens by a masked transformer and one small channel-by-channel head, under plain
cross-entropy. The method: *Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation*
([paper]({{ paper }})).

{{ sizes }}
{% if figures %}## Figures

{{ figures }}
{% endif %}## Use

```python
import torch
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util.checkpoint.load import load_weights

model = TokenBridge.from_pretrained("{{ repo_id }}")
vae, latent_factor = AutoencoderKL.from_pretrained("{{ tokenizer }}")
labels = torch.arange({{ images }})
latents = model.sample_tokens({{ images }}, num_iter=64, cfg=3.0, labels=labels, seeds=range({{ images }}))
images = vae.decode(latents / latent_factor)  # [{{ images }}, 3, H, W], about [-1, 1]
```

`models` is the code of the TokenBridge project; run it from its checkout.

`config.json` holds all that rebuilds the model; classes and the latent factor are there, too.

## Licence

{{ licence }}
"""
#: Settings of an evaluation that belong to its figures.
SETTINGS = ("num_images", "num_iter", "cfg", "cfg_schedule", "temperature", "order", "precision")


def model_card(
    model: nn.Module,
    data: ModelCardData,
    repo_id: str = "owner/repo",
    tokenizer: str | None = None,
    figures: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> ModelCard:
    """The card of a TokenBridge.

    Args:
        model: with its ``config`` and ``metadata``.
        data: what the Hub shows beside the card.
        repo_id: what its usage loads.
        tokenizer: what its usage loads; by default the published KL-16, if the model's latents are scaled as there.
        figures: a ``samples.json`` of ``main_tokenbridge.py``: its metrics, and the settings they were measured at.
        licence: of the weights, by the Hub's short name, such as ``mit``.
    """
    data = copy.deepcopy(data)
    data.license = licence
    if tokenizer is None:
        kl16 = model.config["vae_embed_dim"] == 16 and model.metadata.get("latent_factor") == KL16_LATENT_FACTOR
        tokenizer = f"hf://{hub.VAE_REPO}/kl16.ckpt" if kl16 else "path/to/its/tokenizer"
    return ModelCard.from_template(
        data,
        template_str=CARD,
        paper=PAPER,
        title=repo_id.rpartition("/")[2] or repo_id,
        repo_id=repo_id,
        tokenizer=tokenizer,
        images=min(8, model.class_num),
        sizes=sizes_table(model),
        figures=figures_table(figures or {}),
        licence=f"{licence}." if licence else "Not stated: ask whoever trained it.",
    )


def sizes_table(model: nn.Module) -> str:
    """A table of what the model is."""
    c = model.config
    rows = [
        ["parameters", f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"],
        ["image", f"{c['img_size']} x {c['img_size']} pixels, {c['class_num']} classes"],
        ["tokens", f"{model.seq_len} of {model.token_dim} channels, {c['quant_levels']} levels each"],
        ["backbone", f"{c['encoder_depth']} + {c['decoder_depth']} blocks of width {c['encoder_embed_dim']}"],
        ["head", f"{c['head']}, {c['channel_depth']} blocks of width {c['channel_embed_dim']}"],
        ["latent factor", model.metadata.get("latent_factor") or "the tokenizer's"],
    ]
    return markdown(["", ""], rows)


def figures_table(figures: Mapping[str, Any]) -> str:
    """A table of an evaluation's metrics and settings; empty if it measured none."""
    metrics = [[title, figures[name]] for name, title in TITLES.items() if name in figures]
    settings = figures.get("settings", {})
    rows = metrics + [[name, settings[name]] for name in SETTINGS if name in settings]
    return markdown(["metric", "value"], rows) if metrics else ""
