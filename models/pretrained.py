"""Load models from files, folders and the Hugging Face Hub, and save them there."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import nn

from models.diffusers_vae import DiffusersVAE
from models.published import published_config, to_published
from models.tiny_vae import TinyAutoencoder
from util.checkpoint import hub, vae_files
from util.checkpoint.files import save_folder
from util.checkpoint.load import load_weights
from util.checkpoint.model_card import model_card
from util.checkpoint.runs import find_pretrained, read_run
from util.data.classes import readable
from util.errors import UserError, reason
from util.tables import write_text

# --------------------------------------------------------------------------------------------------
# TokenBridge


class PretrainedTokenBridge(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="tokenbridge",
    tags=["image-generation", "arxiv:2503.16430"],
):
    """``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` of TokenBridge.

    A saved folder contains ``model.safetensors`` with the published names, ``config.json`` and a
    model card.
    """

    #: The constructor arguments of this model.
    config: dict[str, Any]
    #: Entries of ``config.json`` other than constructor arguments: latent factor, class names.
    metadata: Mapping[str, Any] = MappingProxyType({})

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, ImageNet's in words; their numbers if the model stores no names."""
        numbers = [str(label) for label in range(self.config["class_num"])]
        return readable(self.metadata.get("class_names") or numbers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PretrainedTokenBridge":
        """Return a model with the constructor arguments in ``config``; ignore its other entries.

        Raises:
            TypeError, ValueError: the arguments are invalid.
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
        """Return the model of a file, folder or repository, on the CPU, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder of a run, of ``save_pretrained`` or of published
                weights; a checkpoint file; a repository ``owner/repo``; or an address
                ``hf://owner/repo[@revision]/path``.
            revision: a branch, tag or commit of the repository.
            ema: True for the EMA, False for the plain weights; by default the EMA if there is one.
            token, cache_dir, force_download, local_files_only: as in every ``from_pretrained``.
            model_kwargs: constructor arguments that replace the stored ones.

        Raises:
            UserError: there is no such model, or its file is damaged, or the file has no
                configuration and is not a published one.
            TypeError: the model has no such argument.
        """
        unknown = set(model_kwargs) - set(inspect.signature(cls).parameters)
        if unknown:
            raise TypeError(f"{cls.__name__} has no arguments {', '.join(sorted(unknown))}")
        path, _ = find_pretrained(
            pretrained_model_name_or_path,
            revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        return cls.from_content(read_run(path), path, ema, **model_kwargs)

    @classmethod
    def from_content(
        cls, content: Mapping[str, Any], path: str | Path, ema: bool | None = None, **model_kwargs
    ) -> "PretrainedTokenBridge":
        """Return the model of a checkpoint's content; see :meth:`from_pretrained`.

        Args:
            content: from :func:`util.checkpoint.runs.read_run`.
            path: the file that was read, for messages.
        """
        config = cls.config_of(content, path)
        try:
            model = cls.from_config({**config, **model_kwargs})
        except Exception as error:  # impossible sizes fail in many ways
            raise UserError(
                f"{path} does not describe a model that this code can build: {reason(error)}"
            ) from error
        load_weights(model, content, path, ema="model_ema" in content if ema is None else ema)
        model.metadata = {name: value for name, value in config.items() if name not in model.config}
        return model.eval()

    @classmethod
    def config_of(cls, content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
        """Return the ``config`` of a checkpoint.

        A published checkpoint has none: :func:`models.published.published_config` derives it from
        the shapes of the weights.
        """
        return content.get("config") or published_config(cls, content.get("model"), path)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs,
    ) -> str | None:
        """Write ``model.safetensors``, ``config.json`` and, if missing, the card ``README.md``.

        Args:
            save_directory: created if it does not exist.
            config: entries to add to ``config.json``.
            push_to_hub: also upload the files with :meth:`push_to_hub`.
            repo_id: the repository; by default the name of the folder.
            push_to_hub_kwargs: arguments of :meth:`push_to_hub`.
            model_card_kwargs: arguments of :meth:`generate_model_card`.

        Returns:
            the address of the commit, if uploaded.

        Raises:
            UserError: the disk is full, or the folder cannot be written; or see
                :meth:`push_to_hub`.
        """
        folder = Path(save_directory)
        save_folder(
            folder,
            to_published(self.state_dict()),
            {**self.config, **self.metadata, **(config or {})},
        )
        if not (folder / "README.md").exists():
            card_kwargs = {"repo_id": repo_id or str(folder), **(model_card_kwargs or {})}
            write_text(folder / "README.md", str(self.generate_model_card(**card_kwargs)))
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or folder.name,
            config=config,
            model_card_kwargs=model_card_kwargs,
            **push_to_hub_kwargs,
        )

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Upload the files of :meth:`save_pretrained`; create the repository if necessary.

        Args:
            repo_id: ``owner/repo``.
            kwargs: ``private``, ``token``, ``branch``, ``create_pr``, ``commit_message``,
                ``model_card_kwargs``.

        Returns:
            the address of the commit.

        Raises:
            UserError: there is no network, no token, or no permission to write.
        """
        card_kwargs = {"repo_id": repo_id, **(kwargs.pop("model_card_kwargs", None) or {})}
        with hub.explained(hub.Address(repo_id, kwargs.get("branch"), ""), "write to"):
            hub.make_repo(repo_id, kwargs.get("private"), kwargs.get("token"))
            return super().push_to_hub(repo_id, model_card_kwargs=card_kwargs, **kwargs)

    def generate_model_card(self, **kwargs) -> ModelCard:  # type: ignore[override]
        """Return the model card; arguments as of :func:`util.checkpoint.model_card.model_card`."""
        return model_card(self, self._hub_mixin_info.model_card_data, **kwargs)


# --------------------------------------------------------------------------------------------------
# Tokenizer


class PretrainedVAE(nn.Module):
    """``from_pretrained`` and ``save_pretrained`` of :class:`models.vae.AutoencoderKL`."""

    #: The constructor arguments of this tokenizer.
    config: dict[str, Any]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> tuple[nn.Module, float]:
        """Return the tokenizer at ``path``, frozen, and its latent factor.

        A file without a configuration is read as the published KL-16, with latent factor 0.2325.

        Args:
            path: a file; a folder of :meth:`save_pretrained` or of diffusers (the result is then a
                :class:`models.diffusers_vae.DiffusersVAE`); or an address on the Hub,
                ``hf://owner/repo[/path]``. Tiny autoencoders, see
                :mod:`util.checkpoint.tiny_files`, are a :class:`models.tiny_vae.TinyAutoencoder`.

        Raises:
            UserError: the file is missing or unreadable, or its weights do not fit.
        """
        file = vae_files.find_vae(path)
        if vae_files.is_diffusers(file):
            diffusers_vae = DiffusersVAE(vae_files.read_diffusers(file))
            return diffusers_vae, diffusers_vae.latent_factor
        weights, config, latent_factor = vae_files.read_vae(file)
        try:
            is_tiny = config.get("deterministic", False)
            vae = TinyAutoencoder.from_config(config) if is_tiny else cls(**config)
        except Exception as error:  # impossible sizes fail in many ways
            raise UserError(
                f"{file} does not describe a tokenizer that this code can build: {reason(error)}"
            ) from error
        vae_files.load_vae(vae, file, weights)
        return vae.eval().requires_grad_(False), latent_factor

    def load_file(self, path: str | Path, weights: Mapping[str, Any] | None = None) -> None:
        """Load the weights of a tokenizer file of the same sizes.

        Args:
            path: the file.
            weights: its weights, if they are already read.

        Raises:
            UserError: the file is missing or unreadable, or its weights do not fit.
        """
        vae_files.load_vae(self, path, weights)

    def save_pretrained(self, folder: str | Path, latent_factor: float) -> None:
        """Write ``model.safetensors`` and ``config.json`` for :meth:`from_pretrained`.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        vae_files.save_vae_folder(folder, self, latent_factor)
