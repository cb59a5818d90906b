"""TokenBridges that travel: to a folder of safetensors, config and model card, to the Hugging Face Hub, and back."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin

from util import checkpoint
from util.checkpoint import hub, safetensors_io
from util.checkpoint.load import load_weights
from util.config import KL16_LATENT_FACTOR
from util.errors import UserError, reason
from util.files import write_json
from util.metrics import TITLES
from util.tables import markdown, write_text

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


class HubModel(PyTorchModelHubMixin, library_name="tokenbridge", tags=["image-generation", "arxiv:2503.16430"]):
    """``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` of :class:`models.tokenbridge.TokenBridge`.

    A folder holds ``model.safetensors`` under the published names, ``config.json`` and a model card.
    """

    #: What belongs to the weights without being the network's: latent factor, names of the classes.
    about: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        ema: bool | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **model_kwargs,
    ) -> "HubModel":
        """The model of a folder, file or repository with its weights, on the CPU, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder that ``save_pretrained`` or a run wrote, or of published weights; a
                checkpoint's file; a repository ``owner/repo``; or an address, ``hf://owner/repo[@revision]/path``.
            revision: of a repository: a branch, tag or commit.
            ema: the average of the weights, or the weights themselves; by default the average where there is one.
            token, cache_dir, force_download, local_files_only: as of every ``from_pretrained``.
            model_kwargs: arguments of the model other than the stored ones.

        Raises:
            UserError: there is no such model; it is damaged; it says not of what model it is, and is no published one.
            TypeError: an argument that the model does not have.
        """
        unknown = set(model_kwargs) - set(inspect.signature(cls).parameters)
        if unknown:
            raise TypeError(f"{cls.__name__} has no arguments {', '.join(sorted(unknown))}")
        name = pretrained_model_name_or_path
        if not hub.is_address(name) and not Path(name).exists():
            if str(name).count("/") != 1:
                raise UserError(f"{name} is no file or folder here, nor owner/repo, a repository on the Hub")
            name = f"hf://{name}"
        if hub.is_address(name) and revision is not None:
            place = hub.parse(name)
            if place.revision not in (None, revision):
                raise UserError(f"{name} names another revision than {revision}: name one")
            name = place._replace(revision=revision)
        options = {
            "token": token, "cache_dir": cache_dir, "force_download": force_download,
            "local_files_only": local_files_only,
        }  # fmt: skip
        try:
            path = checkpoint.find(name, **options)
        except UserError as error:
            if not hub.is_address(name) or hub.is_address(pretrained_model_name_or_path):
                raise
            raise UserError(f"there is no folder {pretrained_model_name_or_path} here; on the Hub: {error}") from error
        return cls.from_content(checkpoint.read_run(path), path, ema, **model_kwargs)

    @classmethod
    def from_content(
        cls, content: Mapping[str, Any], path: str | Path, ema: bool | None = None, **model_kwargs
    ) -> "HubModel":
        """:meth:`from_pretrained` of what :func:`util.checkpoint.read_run` read from ``path``."""
        config = cls.config_of(content, path)
        try:
            model = cls.from_config({**config, **model_kwargs})
        except Exception as error:  # sizes that cannot be fail in many ways
            raise UserError(f"{path} describes no model that this code can build: {reason(error)}") from error
        load_weights(model, content, path, ema="model_ema" in content if ema is None else ema)
        model.metadata = {name: value for name, value in config.items() if name not in model.config}
        return model.eval()

    @classmethod
    def config_of(cls, content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
        """What a checkpoint tells of its model; of a published one, which tells nothing, what its weights' shapes do.

        Raises:
            UserError: they are of no published model.
        """
        return content.get("config") or cls.published_config(content.get("model"), path)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Mapping | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs,
    ) -> str | None:
        """Writes ``model.safetensors``, ``config.json`` and, where there is none, the model card ``README.md``.

        Args:
            save_directory: made if it is not there.
            config: more entries of ``config.json``; those of :attr:`about` are there anyway.
            repo_id, push_to_hub, push_to_hub_kwargs: also :meth:`push_to_hub`; by default under the folder's name.
            model_card_kwargs: see :meth:`generate_model_card`.

        Raises:
            UserError: the disk is full, or the folder cannot be written; or see :meth:`push_to_hub`.
        """
        folder = Path(save_directory)
        write_json(folder / checkpoint.HUB_CONFIG, {**self.config, **self.metadata, **(config or {})})
        safetensors_io.write_tensors(folder / checkpoint.HUB_NAME, self.state_dict())
        card = {"repo_id": repo_id or str(folder), **(model_card_kwargs or {})}
        if not (folder / "README.md").exists():
            write_text(folder / "README.md", str(self.generate_model_card(**card)))
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or folder.name, config=config, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs
        )

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Makes the repository if there is none, and puts there what :meth:`save_pretrained` writes.

        Args:
            repo_id: ``owner/repo``.
            kwargs: ``private``, ``token``, ``branch``, ``create_pr``, ``commit_message``, ``model_card_kwargs``.

        Returns:
            the commit's address.

        Raises:
            UserError: no network, no token, or no right to write there.
        """
        card = {"repo_id": repo_id, **(kwargs.pop("model_card_kwargs", None) or {})}
        with hub.explained(hub.Address(repo_id, kwargs.get("branch"), ""), "write to"):
            hub.make_repo(repo_id, kwargs.get("private"), kwargs.get("token"))
            return super().push_to_hub(repo_id, model_card_kwargs=card, **kwargs)

    def generate_model_card(
        self,
        repo_id: str = "owner/repo",
        tokenizer: str | None = None,
        figures: Mapping[str, Any] | None = None,
        licence: str | None = None,
    ) -> ModelCard:
        """The card of this model.

        Args:
            repo_id: what its usage loads.
            tokenizer: what its usage loads; by default the published KL-16, if the model's latents are scaled as there.
            figures: a ``samples.json`` of ``main_tokenbridge.py``: its metrics, and the settings they were measured at.
            licence: of the weights, by the Hub's short name, such as ``mit``.
        """
        data = copy.deepcopy(self._hub_mixin_info.model_card_data)
        data.license = licence
        metrics = [[title, figures[name]] for name, title in TITLES.items() if name in figures] if figures else []
        settings = (figures or {}).get("settings", {})
        names = ("num_images", "num_iter", "cfg", "cfg_schedule", "temperature", "order", "precision")
        c, factor = self.config, self.metadata.get("latent_factor")
        if tokenizer is None:
            kl16 = c["vae_embed_dim"] == 16 and factor == KL16_LATENT_FACTOR
            tokenizer = f"hf://{hub.VAE_REPO}/kl16.ckpt" if kl16 else "path/to/its/tokenizer"
        rows = [
            ["parameters", f"{sum(p.numel() for p in self.parameters()) / 1e6:.1f}M"],
            ["image", f"{c['img_size']} x {c['img_size']} pixels, {c['class_num']} classes"],
            ["tokens", f"{self.seq_len} of {self.token_dim} channels, {c['quant_levels']} levels each"],
            ["backbone", f"{c['encoder_depth']} + {c['decoder_depth']} blocks of width {c['encoder_embed_dim']}"],
            ["head", f"{c['head']}, {c['channel_depth']} blocks of width {c['channel_embed_dim']}"],
            ["latent factor", factor or "the tokenizer's"],
        ]
        return ModelCard.from_template(
            data,
            template_str=CARD,
            paper=PAPER,
            title=repo_id.rpartition("/")[2] or repo_id,
            repo_id=repo_id,
            tokenizer=tokenizer,
            images=min(8, self.class_num),
            sizes=markdown(["", ""], rows),
            figures=markdown(
                ["metric", "value"], metrics + [[name, settings[name]] for name in names if name in settings]
            )
            if metrics
            else "",
            licence=f"{licence}." if licence else "Not stated: ask whoever trained it.",
        )
