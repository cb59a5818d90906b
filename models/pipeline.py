"""Generate and edit images with a model and its tokenizer."""

import argparse
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import models.location  # noqa: F401, before packages of the same names

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.editing import (
    Edit,
    ImageOrPath,
    as_images,
    insert_generated,
    kept_tokens,
    prepare_edit,
)
from models.sampling import SamplingOptions, check_guidance, check_head_options, sampling_plan
from models.tokenbridge import TokenBridge
from models.tokenizer import Tokenizer, images_at_once
from util.checkpoint import hub
from util.checkpoint.files import HUB_CONFIG, VAE_NAMES
from util.checkpoint.runs import find_pretrained, read_run
from util.config import check_tokenizer
from util.data.classes import find_classes
from util.devices import to_device
from util.errors import UserError
from util.log import log
from util.precision import PRECISIONS, autocast, check_finite
from util.rng import image_seeds, numbered_draws

#: Names of a tokenizer next to a model: a folder of ``save_pretrained`` or diffusers, or a file.
TOKENIZER_NAMES = ("vae", "vae.ckpt")
#: The gray of tokens that are not generated yet.
GRAY = 128
#: Share of the tokens that a variation regenerates by default.
DEFAULT_STRENGTH = 0.5
#: Arguments of ``from_pretrained`` for models on the Hub.
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
#: Arguments of diffusers' pipelines, and what to do here instead.
DIFFUSERS_ARGUMENTS = {
    "prompt": "pass class_labels",
    "negative_prompt": "the model knows classes, not texts",
    "num_inference_steps": "pass num_iter",
    "guidance_scale": "pass cfg",
    "generator": "pass seeds, a number for each image",
    "num_images_per_prompt": "pass seeds, one for each image, as in seeds=range(4)",
    "callback_on_step_end": "pass callback",
    "output_type": "images are PIL images",
    "height": "images have the model's size",
    "width": "images have the model's size",
    "torch_dtype": "pass precision",
    "dtype": "pass precision",
    "device": "move the pipeline with .to(device)",
    "device_map": "move the pipeline with .to(device)",
    "vae": "pass tokenizer",
}

# --------------------------------------------------------------------------------------------------
# Images and tokenizer files


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return bytes ``[N, 3, H, W]`` as PIL images."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def find_own_tokenizer(
    path: Path, source: str | Path | hub.Address, content: Mapping[str, Any], **options
) -> str | Path:
    """Return the tokenizer next to a model's file, otherwise the ``vae_path`` stored in the file.

    Args:
        path, source: from :func:`util.checkpoint.runs.find_pretrained`.
        content: the content of the model's file.
        options: of :func:`util.checkpoint.hub.fetch`.

    Raises:
        UserError: neither exists.
    """
    if hub.is_address(source):
        for name in ("vae.ckpt", f"vae/{HUB_CONFIG}", *(f"vae/{name}" for name in VAE_NAMES)):
            hub.fetch_beside(source, path, name, **options)
    flags = content.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    stored_path = flags.get("vae_path") if isinstance(flags, dict) else None
    candidates: list[str | Path] = [path.parent / name for name in TOKENIZER_NAMES]
    missing = ""
    # In a damaged file the entry may have any type.
    if isinstance(stored_path, str) and stored_path:
        candidates.append(stored_path)
        missing = f", and the tokenizer of its run, {stored_path}, is missing"
    for candidate in candidates:
        if hub.is_address(candidate) or Path(candidate).exists():
            return candidate
    names = " or ".join(TOKENIZER_NAMES)
    raise UserError(
        f"{path} has no tokenizer beside it ({names}){missing}: pass one (--vae_path, or the "
        "tokenizer of from_pretrained)"
    )


# --------------------------------------------------------------------------------------------------
# Arguments and results

#: One image or several; see :func:`models.editing.as_images`.
ImageArgument = (
    ImageOrPath | Tensor | np.ndarray | Sequence[ImageOrPath | Tensor | np.ndarray] | None
)
#: Receives the step, the number of steps, and all images so far, gray where not generated yet.
Callback = Callable[[int, int, list[Image.Image]], None]


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise UserError if there is no ``known`` argument of a ``given`` name.

    Args:
        what: the function and its verb, for the message.
    """
    known = list(known)
    for name in sorted(set(given) - set(known)):
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"{what} {', '.join(known)}"
        raise UserError(f"there is no option {name}: {DIFFUSERS_ARGUMENTS.get(name, remedy)}")


def as_list(value: Any) -> list:
    """Return the items of a sequence, array or tensor; any other value as the only item."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) or not isinstance(value, Iterable):
        return [value]
    return [item.tolist() if hasattr(item, "tolist") else item for item in value]


class Request(NamedTuple):
    """The inputs of N images."""

    labels: list[int] | None
    seeds: list[int]  # of the sampler
    edits: list[Edit] | None
    kept: Tensor | None  # [N, L], true where a token of the edited image is kept


@dataclass
class GeneratedImages:
    """N generated images, with their classes, seeds and likelihood."""

    images: list[Image.Image]
    labels: list[int] | None  # classes
    seeds: list[int]
    #: ``[N, h, w]``, the log-probability of each token in nats when it was sampled; 0 if kept.
    confidence: Tensor
    #: ``[N, h, w]``, true where a token of the edited image was kept.
    kept: Tensor

    @property
    def log_likelihoods(self) -> list[float]:
        """The sum of :attr:`confidence` per image: comparable between images of the same mask."""
        return self.confidence.double().sum(dim=(1, 2)).tolist()

    def file_name(self, row: int) -> str:
        """Return a file name for an image, with its class and seed."""
        label = "any" if self.labels is None else self.labels[row]
        return f"class-{label}-seed-{self.seeds[row]}.png"

    def part(self, rows: Sequence[int]) -> "GeneratedImages":
        """Return the images of some rows, in the given order."""
        return GeneratedImages(
            images=[self.images[row] for row in rows],
            labels=self.labels and [self.labels[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
            confidence=self.confidence[list(rows)],
            kept=self.kept[list(rows)],
        )

    def ranked(self) -> "GeneratedImages":
        """Return all images, the most likely first."""
        scores = self.log_likelihoods
        return self.part(sorted(range(len(scores)), key=lambda row: -scores[row]))


# --------------------------------------------------------------------------------------------------
# Pipeline


class TokenBridgePipeline:
    """Generates images of classes, and regenerates parts of images.

    Args:
        model: in evaluation mode.
        tokenizer: the one that the model was trained with, such as
            ``Tokenizer.from_pretrained("pretrained_models/taef2")``.
        precision: of autocast, as of ``--evaluate``: ``"bf16"``, ``"fp16"`` or ``"fp32"``. The
            weights stay float32.
        name: the name of the model in messages.

    Raises:
        UserError: the model was trained with another tokenizer, an argument has another type, or
            the precision is unknown.
    """

    def __init__(
        self,
        model: TokenBridge,
        tokenizer: Tokenizer,
        precision: str = "bf16",
        name: str = "the model",
    ):
        if not isinstance(model, TokenBridge) or not isinstance(tokenizer, Tokenizer):
            given = f"{type(model).__name__} and {type(tokenizer).__name__}"
            raise UserError(
                f"a pipeline consists of a TokenBridge and a Tokenizer, not of {given}: see "
                "Tokenizer.from_pretrained"
            )
        if precision not in PRECISIONS:
            raise UserError(f"precision {precision!r}: choose {', '.join(PRECISIONS)}")
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        sizes = (tokenizer.embed_dim, tokenizer.stride)
        expected_sizes = (model.vae_embed_dim, model.config["vae_stride"])
        latent_factor = model.metadata.get("latent_factor", tokenizer.latent_factor)
        same_factor = math.isclose(tokenizer.latent_factor, latent_factor, rel_tol=1e-6)
        if sizes != expected_sizes or not same_factor:
            form = "{} latent channels, stride {}, latent factor {:.4g}".format
            raise UserError(
                f"the model was trained with another tokenizer: {tokenizer.source} has "
                f"{form(*sizes, tokenizer.latent_factor)}; the model needs "
                f"{form(*expected_sizes, latent_factor)}"
            )
        if "vae_sha256" in model.metadata:
            check_tokenizer(model.metadata, tokenizer.info, name)
        #: See :attr:`models.pretrained.PretrainedTokenBridge.class_names`.
        self.class_names = model.class_names
        self.to(model.device)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        tokenizer: str | Path | None = None,
        *,
        ema: bool | None = None,
        precision: str = "bf16",
        **options,
    ) -> "TokenBridgePipeline":
        """Return a pipeline on the CPU.

        Args:
            model, ema: see :meth:`TokenBridge.from_pretrained`.
            tokenizer: see :meth:`Tokenizer.from_pretrained`; by default ``vae`` or ``vae.ckpt``
                next to the model's file, otherwise the ``vae_path`` stored in the file.
            precision: see the class.
            options: of the Hub, as in every ``from_pretrained``: :data:`HUB_OPTIONS`.

        Raises:
            UserError: a file is missing or damaged, the model was trained with another tokenizer,
                or an option is unknown.
        """
        check_names(options, HUB_OPTIONS, "from_pretrained takes tokenizer, ema, precision,")
        if isinstance(tokenizer, Tokenizer):
            raise UserError(
                "tokenizer is a path here; for an object, use TokenBridgePipeline(model, object)"
            )
        path, source = find_pretrained(model, **options)
        content = read_run(path)
        if tokenizer is None:
            options.pop("revision", None)  # part of the address
            tokenizer = find_own_tokenizer(path, source, content, **options)
        loaded_tokenizer = Tokenizer.from_pretrained(str(tokenizer))
        loaded_model: Any = TokenBridge.from_content(content, path, ema)
        return cls(loaded_model, loaded_tokenizer, precision, str(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer for :meth:`from_pretrained`, the tokenizer to ``vae/``.

        Raises:
            UserError: the disk is full, the folder cannot be written, or the tokenizer is one of
                diffusers, whose folder can be copied.
        """
        if not hasattr(self.tokenizer.vae, "save_pretrained"):
            raise UserError(
                f"save the model with model.save_pretrained({str(folder)!r}), and copy the "
                f"tokenizer's folder, {self.tokenizer.source}, to {folder}/vae"
            )
        identity = {
            "latent_factor": self.tokenizer.latent_factor,
            "vae_sha256": self.tokenizer.fingerprint,
        }
        self.model.save_pretrained(folder, config=identity)
        self.tokenizer.vae.save_pretrained(Path(folder) / "vae", self.tokenizer.latent_factor)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def to(self, device: torch.device | str, dtype: None = None) -> "TokenBridgePipeline":
        """Move this pipeline to ``device`` and return it.

        Raises:
            UserError: a dtype is given.
        """
        if dtype is not None or isinstance(device, torch.dtype):
            raise UserError(
                "the weights of a pipeline stay float32: for half precision, pass "
                "precision='bf16' or 'fp16' to from_pretrained"
            )
        self.model.to(device)
        self.tokenizer.to(device).to(device, memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        *,
        seeds: int | Sequence[int] | None = None,
        image: ImageArgument = None,
        mask_image: ImageArgument = None,
        strength: float | None = None,
        gen_seed: int = 0,
        batch_size: int = 64,
        callback: Callback | None = None,
        **sampling,
    ) -> GeneratedImages:
        """Return one image for each item of the longest list among the first four arguments.

        Single values apply to all images.

        Args:
            class_labels: numbers or names of classes; None generates images of any class.
            seeds: numbers from 0 to 2^32 - 1, by default 0, 1, ..., so that the same call returns
                the same images again. Seed n generates the image that ``--evaluate`` with
                ``gen_seed`` writes as image n, if the class is the same. Other batch sizes only
                change rounding.
            image: to edit; cropped to the model's size as training images are. PIL images of any
                mode, paths, tensors ``[B, 3, H, W]`` or ``[3, H, W]``, or arrays ``[B, H, W, 3]``
                or ``[H, W, 3]``, of bytes or in [0, 1].
            mask_image: of the image's size, white (or transparent) where the image is regenerated,
                or a name in :data:`models.editing.REGIONS`. The other pixels do not change. Types
                as of ``image``, with one channel. Without a mask the result is a variation of the
                image.
            strength: share of the tokens that a variation regenerates, above 0 and at most 1; 0.5
                by default. A mask or no image excludes it.
            gen_seed: ``--gen_seed``.
            batch_size: images per batch, halved if memory is not sufficient. The default is that of
                ``--eval_bsz``.
            callback: see :data:`Callback`. Without it, the device is only synchronized at the end
                of a batch.
            sampling: options of :class:`models.sampling.SamplingOptions`: ``num_iter`` (at most one
                step per token), ``cfg``, ``cfg_schedule``, ``cfg_interval``, ``cfg_reuse``,
                ``temperature``, ``order``, ``confidence_noise``, ``step_schedule``,
                ``first_place``; with the masked head ``head_steps`` and ``head_order``.

        Raises:
            UserError: a class is unknown; a number is out of range; an image or mask is unusable;
                lists differ in length; guidance is used with a model that was trained without
                unlabeled images; the model computes NaN or infinity; or there is not enough memory
                for one image.
        """
        # Check the arguments
        options = self.checked_options(sampling, labeled=class_labels is not None)
        lists = {
            "class_labels": as_list(class_labels),
            "seeds": as_list(seeds),
            "image": as_images(image, "image"),
            "mask_image": as_images(mask_image, "mask_image"),
        }
        count = max(map(len, lists.values()))
        for name, values in lists.items():
            if len(values) not in (1, count):
                raise UserError(
                    f"{len(values)} {name} for {count} images: pass one, or one for each image"
                )
            lists[name] = values * count if len(values) == 1 else values
        numbers = list(range(count)) if seeds is None else lists["seeds"]
        valid = all(isinstance(number, int) and 0 <= number < 2**32 for number in numbers)
        if not valid or gen_seed < 0:
            raise UserError(
                f"seeds must be whole numbers from 0 to {2**32 - 1}, and gen_seed not negative"
            )
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: it must be above zero")
        labels = None
        if class_labels is not None:
            labels = [self.class_number(label) for label in lists["class_labels"]]
        edits, kept = self.prepare_edits(
            lists["image"], lists["mask_image"], strength, gen_seed, numbers
        )

        # Generate
        request = Request(labels, image_seeds(gen_seed, numbers), edits, kept)
        images, confidence = self.generate(request, options, batch_size, callback)
        kept_map = torch.zeros_like(confidence, dtype=torch.bool)
        if kept is not None:
            kept_map = kept.view_as(confidence)
        return GeneratedImages(images, labels, numbers, confidence, kept_map)

    # ----------------------------------------------------------------------------------------------
    # Checked arguments

    def checked_options(self, sampling: Mapping[str, Any], labeled: bool = True) -> SamplingOptions:
        """Return the sampling options, with at most one step per token.

        Args:
            labeled: whether the images have given classes.

        Raises:
            UserError: an option is out of range or does not apply to the model.
        """
        _, *arguments, _ = inspect.signature(TokenBridgePipeline.__call__).parameters
        check_names(sampling, (*arguments, *SamplingOptions.__dataclass_fields__), "there are")
        try:
            options = SamplingOptions(**sampling)
            for name in ("cfg", "temperature", "confidence_noise"):
                if not math.isfinite(value := getattr(options, name)):
                    raise ValueError(f"{name} must be a finite number, got {float(value)}")
            steps = min(options.num_iter, self.model.seq_len)
            options = replace(options, num_iter=steps)
            check_head_options(self.model.head, options)
            check_guidance(self.model.config["label_drop_prob"], options.cfg, labeled)
            return options
        except ValueError as error:
            raise UserError(str(error)) from error

    def class_number(self, label: int | str) -> int:
        """Return the number of a class, given its name or number.

        Raises:
            UserError: there is no such class; the message suggests similar names.
        """
        if isinstance(label, str):
            return find_classes([label], self.class_names)[0]
        if (
            isinstance(label, bool)
            or not isinstance(label, int)
            or not 0 <= label < self.model.class_num
        ):
            is_number = isinstance(label, int | float)
            description = label if is_number else f"of type {type(label).__name__}"
            raise UserError(
                f"no class {description}: there are {self.model.class_num}, numbered from 0"
            )
        return label

    def prepare_edits(
        self,
        images: Sequence,
        masks: Sequence,
        strength: float | None,
        gen_seed: int,
        numbers: Sequence[int],
    ) -> tuple[list[Edit] | None, Tensor | None]:
        """Return the images to edit, and which of their tokens ``[N, L]`` are kept.

        Both are None without images.

        Args:
            images, masks: PIL images, paths or None, one for each generated image.
            strength: the share of regenerated tokens of variations; None for the default.
            gen_seed, numbers: determine the random choice of these tokens.
        """
        if len({image is None for image in images}) > 1:
            raise UserError("pass an image to edit for each generated image, or none at all")
        is_variation = images[0] is not None and masks[0] is None
        if strength is not None and not is_variation:
            raise UserError("strength is for variations: pass it with an image and without a mask")
        if images[0] is None:
            if masks[0] is not None:
                raise UserError("a mask needs an image: pass both")
            return None, None
        if len({mask is None for mask in masks}) > 1:
            raise UserError("pass a mask for each image, or none at all")
        size = self.model.config["img_size"]
        edits = [prepare_edit(image, mask, size) for image, mask in zip(images, masks, strict=True)]
        if masks[0] is not None:
            masked_pixels = torch.stack([edit.mask for edit in edits])
            kept = kept_tokens(masked_pixels, self.model.grid_size)
            if not kept.any(dim=1).all():
                text = (
                    "the image has no influence: all its tokens are masked or next to masked ones"
                )
                log.warning(text)
            return edits, kept
        strength = DEFAULT_STRENGTH if strength is None else strength
        if not 0 < strength <= 1:
            raise UserError(f"strength {float(strength)}: it must be above 0 and at most 1")
        length = self.model.seq_len
        num_regenerated = max(1, round(strength * length))
        ranks = numbered_draws(gen_seed, numbers).uniform(length).argsort(dim=1).argsort(dim=1)
        return edits, ranks >= num_regenerated

    # ----------------------------------------------------------------------------------------------
    # Generation

    def generate(
        self, request: Request, options: SamplingOptions, batch_size: int, callback: Callback | None
    ) -> tuple[list[Image.Image], Tensor]:
        """Return all images and their confidence ``[N, h, w]``.

        All images of a batch have the same number of kept tokens.
        """
        count = len(request.seeds)
        length = self.model.seq_len
        num_kept = [0] * count if request.kept is None else request.kept.sum(dim=1).tolist()
        groups = [
            [row for row in range(count) if num_kept[row] == number]
            for number in sorted(set(num_kept))
        ]
        batches = [
            rows[i : i + batch_size] for rows in groups for i in range(0, len(rows), batch_size)
        ]
        size = self.model.config["img_size"]
        images: list[Image.Image] = [Image.new("RGB", (size, size), (GRAY,) * 3)] * count
        confidence = torch.zeros(count, length)
        done = 0  # steps of the finished batches

        def steps_of(rows: Sequence[int]) -> int:
            return len(sampling_plan(options, length, length - num_kept[rows[0]]))

        while batches:
            rows, *rest = batches
            total = done + sum(map(steps_of, batches))

            def on_step(
                step: int,
                _: int,
                tokens: Tensor,
                unknown: Tensor,
                rows=rows,
                done=done,
                total=total,
            ) -> None:
                latents = self.model.unpatchify(tokens)
                images_so_far = self.decode_images(latents, request, rows, unknown)
                for row, image in zip(rows, images_so_far, strict=True):
                    images[row] = image
                callback(done + step, total, list(images))

            try:
                batch_images, confidence[rows] = self.generate_batch(
                    request, rows, options, on_step if callback else None
                )
            except torch.OutOfMemoryError as error:
                if len(rows) == 1:
                    raise UserError(f"{self.device} has too little memory for one image") from error
                log.info("%d images per batch do not fit in memory: halving the batch", len(rows))
                half = len(rows) // 2
                batches = [rows[:half], rows[half:], *rest]
                continue
            for row, image in zip(rows, batch_images, strict=True):
                images[row] = image
            done += steps_of(rows)
            batches = rest
        return images, confidence.unflatten(1, (self.model.grid_size, -1))

    def generate_batch(
        self, request: Request, rows: Sequence[int], options: SamplingOptions, on_step
    ) -> tuple[list[Image.Image], Tensor]:
        """Return the images of some rows and their tokens' confidence ``[B, L]``.

        Args:
            on_step: see :meth:`models.tokenbridge.TokenBridge.sample_tokens`.
        """
        inputs: dict[str, Any] = {
            "labels": request.labels and [request.labels[row] for row in rows],
            "seeds": [request.seeds[row] for row in rows],
        }
        if request.edits is not None:
            seen = torch.stack([request.edits[row].seen for row in rows])
            inputs["known_latents"] = self.encode(seen)
            inputs["known_mask"] = request.kept[rows]
        with autocast(self.device, self.precision):
            latents, confidence = self.model.sample_tokens(
                len(rows), **asdict(options), **inputs, return_confidence=True, on_step=on_step
            )
        images = self.decode_images(latents, request, rows)
        confidence = confidence.cpu()
        # Sampled levels are always finite. NaN shows in the known latents and the confidence.
        if "known_latents" in inputs:
            check_finite(inputs["known_latents"], "the tokenizer's encoder", "fp32")
        check_finite(confidence, "the transformer", self.precision)
        return images, confidence

    def encode(self, images: Tensor) -> Tensor:
        """Return the most probable scaled latents ``[B, C, h, w]``.

        Args:
            images: ``[B, 3, S, S]`` in [-1, 1].
        """
        parts = [
            to_device(part, self.device).contiguous(memory_format=torch.channels_last)
            for part in images.split(images_at_once(self.device, images[0, 0].numel()))
        ]
        with autocast(self.device, "fp32"):
            latents = torch.cat([self.tokenizer.encode(part).mode() for part in parts])
        return latents.contiguous()

    def decode_images(
        self, latents: Tensor, request: Request, rows: Sequence[int], unknown: Tensor | None = None
    ) -> list[Image.Image]:
        """Return scaled latents as images, inserted into the edited images.

        Args:
            unknown: ``[B, N]``, positions of tokens that are not generated yet, shown in gray.
        """
        images = self.tokenizer.decode_images(latents, self.precision)
        mask = torch.ones(len(rows), *images.shape[2:], dtype=torch.bool)
        if request.edits is not None:
            original = torch.stack([request.edits[row].original for row in rows])
            mask = torch.stack([request.edits[row].mask for row in rows])
            images = insert_generated(images, original, mask)
        if unknown is not None:
            grid = self.model.grid_size
            cell = images.shape[-1] // grid  # pixels per token, in each direction
            missing = torch.zeros(len(rows), grid * grid, dtype=torch.bool)
            missing = missing.scatter(1, unknown.cpu(), True).unflatten(1, (grid, grid))
            missing = missing.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
            images = images.masked_fill((missing & mask)[:, None], GRAY)
        return to_pil(images)
