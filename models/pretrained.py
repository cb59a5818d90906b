"""Models to and from files: folders of safetensors, config and model card; checkpoints; the Hugging Face Hub.

:mod:`util.checkpoint`, which loads the Hub's code and for a model card that of metrics, is imported inside the methods
that need it: whoever only builds a model loads none of that.
"""

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import nn

from models.diffusers_vae import DiffusersVAE
from models.published import published_config, to_published
from models.tiny_vae import TinyAutoencoder
from util.errors import UserError, reason, some
from util.files import read_json, write_json
from util.tables import write_text

# --------------------------------------------------------------------------------------------------------------------
# TokenBridge.


class PretrainedTokenBridge(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="tokenbridge",
    tags=["image-generation", "arxiv:2503.16430"],
):
    """``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` of :class:`models.tokenbridge.TokenBridge`.

    A folder holds ``model.safetensors`` under the published names, ``config.json`` and a model card.
    """

    #: Entries of ``config.json`` that are no arguments of the model: latent factor, names of the classes.
    metadata: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PretrainedTokenBridge":
        """The model with the arguments that ``config``, a model's own or a checkpoint's, holds; the rest is ignored.

        Raises:
            TypeError, ValueError: there is no such model.
        """
        names = inspect.signature(cls).parameters
        return cls(**{name: value for name, value in config.items() if name in names})

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
    ) -> "PretrainedTokenBridge":
        """The model of a folder, file or repository with its weights, on the CPU, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder that ``save_pretrained`` or a run wrote, or of published weights; a
                checkpoint's file; a repository ``owner/repo``; or an address, ``hf://owner/repo[@revision]/path``.
            revision: of a repository: a branch, tag or commit.
            ema: the average of the weights, or the weights themselves; by default the average where there is one.
            token, cache_dir, force_download, local_files_only: as of every ``from_pretrained``.
            model_kwargs: arguments of the model other than the stored ones.

        Raises:
            UserError: there is no such model; it is damaged; it does not describe itself and is no published one.
            TypeError: an argument that the model does not have.
        """
        from util.checkpoint.runs import read_run

        unknown = set(model_kwargs) - set(inspect.signature(cls).parameters)
        if unknown:
            raise TypeError(f"{cls.__name__} has no arguments {', '.join(sorted(unknown))}")
        path, _ = find_pretrained(
            pretrained_model_name_or_path, revision, token=token, cache_dir=cache_dir, force_download=force_download,
            local_files_only=local_files_only,
        )  # fmt: skip
        return cls.from_content(read_run(path), path, ema, **model_kwargs)

    @classmethod
    def from_content(
        cls, content: Mapping[str, Any], path: str | Path, ema: bool | None = None, **model_kwargs
    ) -> "PretrainedTokenBridge":
        """:meth:`from_pretrained` of what :func:`util.checkpoint.runs.read_run` read from ``path``."""
        from util.checkpoint.load import load_weights

        config = cls.config_of(content, path)
        try:
            model = cls.from_config({**config, **model_kwargs})
        except Exception as error:  # impossible sizes fail in many ways
            raise UserError(
                f"{path} describes no model that this code can build: {reason(error)}"
            ) from error
        load_weights(model, content, path, ema="model_ema" in content if ema is None else ema)
        model.metadata = {name: value for name, value in config.items() if name not in model.config}
        return model.eval()

    @classmethod
    def config_of(cls, content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
        """The ``config`` in a checkpoint; of a published one, which holds none, see :func:`published_config`."""
        return content.get("config") or published_config(cls, content.get("model"), path)

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
            config: entries of ``config.json`` besides the model's and those of :attr:`metadata`.
            repo_id, push_to_hub, push_to_hub_kwargs: also :meth:`push_to_hub`; by default under the folder's name.
            model_card_kwargs: see :meth:`generate_model_card`.

        Raises:
            UserError: the disk is full, or the folder cannot be written; or see :meth:`push_to_hub`.
        """
        from util.checkpoint import safetensors_io
        from util.checkpoint.files import HUB_CONFIG, HUB_NAME

        folder = Path(save_directory)
        write_json(folder / HUB_CONFIG, {**self.config, **self.metadata, **(config or {})})
        safetensors_io.write_tensors(folder / HUB_NAME, to_published(self.state_dict()))
        if not (folder / "README.md").exists():
            card = self.generate_model_card(
                **{"repo_id": repo_id or str(folder), **(model_card_kwargs or {})}
            )
            write_text(folder / "README.md", str(card))
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or folder.name,
            config=config,
            model_card_kwargs=model_card_kwargs,
            **push_to_hub_kwargs,
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
        from util.checkpoint import hub

        card = {"repo_id": repo_id, **(kwargs.pop("model_card_kwargs", None) or {})}
        with hub.explained(hub.Address(repo_id, kwargs.get("branch"), ""), "write to"):
            hub.make_repo(repo_id, kwargs.get("private"), kwargs.get("token"))
            return super().push_to_hub(repo_id, model_card_kwargs=card, **kwargs)

    def generate_model_card(self, **kwargs) -> ModelCard:
        """The card of this model; ``kwargs`` are those of :func:`util.checkpoint.model_card.model_card`."""
        from util.checkpoint.model_card import model_card

        return model_card(self, self._hub_mixin_info.model_card_data, **kwargs)


def find_pretrained(asked: str | Path, revision: str | None = None, **options) -> tuple[Path, Any]:
    """The file of a model's weights, fetched where it lies on the Hub, and the path or address that it was found by.

    Args:
        asked, revision: see :meth:`PretrainedTokenBridge.from_pretrained`.
        options: of :func:`util.checkpoint.hub.fetch`.

    Raises:
        UserError: there is no such model.
    """
    from util.checkpoint import hub
    from util.checkpoint.runs import find_checkpoint

    name = asked
    if not hub.is_address(name) and not Path(name).exists():
        beside = (
            [str(path) for path in Path(name).parent.iterdir()]
            if Path(name).parent.is_dir()
            else []
        )
        if close := difflib.get_close_matches(str(Path(name)), beside, n=1):
            raise UserError(f"{name} is no file or folder here; did you mean {close[0]}?")
        if str(name).count("/") != 1:
            raise UserError(
                f"{name} is no file or folder here, nor owner/repo, a repository on the Hub"
            )
        name = f"hf://{name}"
    if hub.is_address(name) and revision is not None:
        place = hub.parse(name)
        if place.revision not in (None, revision):
            raise UserError(f"{name} names another revision than {revision}: name one")
        name = place._replace(revision=revision)
    try:
        return find_checkpoint(name, **options), name
    except UserError as error:
        if not hub.is_address(name) or hub.is_address(asked):
            raise
        raise UserError(f"there is no folder {asked} here; on the Hub: {error}") from error


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer.


class PretrainedVAE:
    """``from_pretrained`` and ``save_pretrained`` of :class:`models.vae.AutoencoderKL`."""

    @classmethod
    def from_pretrained(cls, path: str) -> tuple[nn.Module, float]:
        """The tokenizer at ``path``, built as its file says, frozen, and its latent factor.

        A file that does not describe itself is taken for the published KL-16, factor 0.2325.

        Args:
            path: a file; a folder of :meth:`save_pretrained` or of diffusers (then the tokenizer is a
                :class:`models.diffusers_vae.DiffusersVAE`); or an address on the Hub, ``hf://owner/repo[/path]``.
                Tiny autoencoders, see :mod:`util.checkpoint.tiny_files`, are a
                :class:`models.tiny_vae.TinyAutoencoder`.

        Raises:
            UserError: the file is missing, unreadable, or does not hold the weights of such a tokenizer.
        """
        from util.checkpoint.files import VAE_NAMES, config_beside
        from util.checkpoint.tiny_files import DIFFUSERS_CLASS, locate_tokenizer
        from util.checkpoint.vae_files import load_vae, read_vae

        path = locate_tokenizer(path, VAE_NAMES)
        check_diffusers(path)
        beside = config_beside(path)
        kind = beside.get("_class_name") if isinstance(beside, dict) else None
        if kind not in (None, DIFFUSERS_CLASS):
            vae = DiffusersVAE(read_diffusers(path))
            return vae, vae.latent_factor
        weights, config, latent_factor = read_vae(path)
        try:
            tiny = config.get("deterministic", False)
            vae = TinyAutoencoder.from_config(config) if tiny else cls(**config)
        except Exception as error:  # impossible sizes fail in many ways
            raise UserError(
                f"{path} describes no tokenizer that this code can build: {reason(error)}"
            ) from error
        load_vae(vae, path, weights)
        return vae.eval().requires_grad_(False), latent_factor

    def load_file(self, path: str | Path, weights: Mapping[str, Any] | None = None) -> None:
        """Loads the weights of a tokenizer of this one's sizes, or ``weights`` that were read from the file ``path``.

        Raises:
            UserError: the file is missing or unreadable, or its weights do not fit.
        """
        from util.checkpoint.vae_files import load_vae

        load_vae(self, path, weights)

    def save_pretrained(self, folder: str | Path, latent_factor: float) -> None:
        """Writes ``model.safetensors`` and ``config.json``, which :meth:`from_pretrained` reads.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        from util.checkpoint.vae_files import save_vae_folder

        save_vae_folder(folder, self, latent_factor)


def check_diffusers(path: Path) -> None:
    """Raise UserError for weights of diffusers in another form than the one that is read; it names what is there.

    Args:
        path: the tokenizer's file, or the one that was looked for in its folder.
    """
    from util.checkpoint.files import HUB_CONFIG, VAE_NAMES

    whole = VAE_NAMES[-1]
    if path.name == whole or (path.is_file() and not path.name.startswith(Path(whole).stem)):
        return
    if found := sorted(each.name for each in path.parent.glob(f"{Path(whole).stem}*")):
        config = path.with_name(HUB_CONFIG)
        kind = read_json(config).get("_class_name") if config.is_file() else "AutoencoderKL"
        variant = ', variant="fp16"' if all(".fp16." in name for name in found) else ""
        raise UserError(
            f"{path.parent} holds {some(found)}; tokenizers of diffusers are read from {whole} alone: name the folder "
            f'if it is there, or write it by {kind}.from_pretrained("{path.parent}"{variant})'
            ".save_pretrained(another folder), in Python, with diffusers' class"
        )


def read_diffusers(path: Path) -> nn.Module:
    """The ``AutoencoderKL`` of diffusers with the weights ``path``, beside their ``config.json``.

    Raises:
        UserError: diffusers is not installed, the files are damaged or do not fit each other, or the latents are scaled
            channel by channel, for which the quantizer has no levels.
    """
    from util.checkpoint.files import VAE_NAMES

    if path.name != VAE_NAMES[-1]:  # diffusers would read another file of the folder
        raise UserError(
            f"{path}: tokenizers of diffusers are read from {VAE_NAMES[-1]}; name their folder"
        )
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} is a tokenizer of diffusers, which is missing: pip install diffusers"
        ) from error
    try:
        vae, loaded = AutoencoderKL.from_pretrained(
            str(path.parent), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
            output_loading_info=True, torch_dtype=torch.float32,
        )  # fmt: skip
    except Exception as error:  # damaged files and impossible sizes fail in many ways
        raise UserError(f"{path} cannot be read by diffusers ({reason(error)})") from error
    wrong = {
        what: names for what in ("missing_keys", "mismatched_keys") if (names := loaded.get(what))
    }
    wrong |= {
        "not finite": [
            name for name, value in vae.state_dict().items() if not value.isfinite().all()
        ]
    }
    if any(wrong.values()):
        raise UserError(f"{path} does not fit its config.json: {wrong}")
    if vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None:
        raise UserError(
            f"{path} scales each latent channel on its own (latents_mean, latents_std): not supported"
        )
    return vae
