"""A model and its tokenizer as one: classes, seeds and images in, pictures out."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.editing import Edit, Picture, as_pictures, edit_of, kept_tokens, put_into
from models.pretrained import find_pretrained
from models.sampling import SamplingOptions, check_guidance, check_head_options, sampling_plan
from models.tokenbridge import TokenBridge
from models.tokenizer import Tokenizer, images_at_once
from util.config import check_tokenizer
from util.data.classes import find_classes, readable
from util.devices import to_device
from util.errors import UserError
from util.log import log
from util.precision import autocast, check_finite
from util.rng import image_seeds, numbered_draws

#: The tokenizer beside a model's file: a folder of ``save_pretrained`` or diffusers, or what main_vae.py writes.
BESIDE = ("vae", "vae.ckpt")
UNKNOWN = 128  # the grey of tokens that a picture does not have yet

# --------------------------------------------------------------------------------------------------------------------
# Images and the files of tokenizers.


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Bytes ``[N, 3, H, W]`` as pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def own_tokenizer(path: Path, address: Any, content: Mapping[str, Any], **options) -> str | Path:
    """The tokenizer that lies beside a model's file, or else the one that the run which wrote it names.

    Args:
        path, address: see :func:`models.pretrained.find_pretrained`.
        content: of the file.
        options: see :func:`util.checkpoint.hub.fetch`.

    Raises:
        UserError: there is none.
    """
    from util.checkpoint import hub
    from util.checkpoint.files import HUB_CONFIG, VAE_NAMES

    if hub.is_address(address):
        for name in ("vae.ckpt", f"vae/{HUB_CONFIG}", *(f"vae/{name}" for name in VAE_NAMES)):
            hub.fetch_beside(address, path, name, **options)
    flags = content.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    named: Any = flags.get("vae_path") if isinstance(flags, dict) else None
    named = named if isinstance(named, str) else None  # a damaged file may hold anything
    for place in [*(path.parent / name for name in BESIDE), *([named] if named else [])]:
        if hub.is_address(place) or Path(place).exists():
            return place
    was = f", and {named}, which its run names, is not here" if named else ""
    raise UserError(
        f"{path} has no tokenizer beside it ({' or '.join(BESIDE)}){was}: name it (--vae_path, or the tokenizer of "
        "from_pretrained)"
    )


# --------------------------------------------------------------------------------------------------------------------
# What goes in and out.

#: One image or several: see :func:`models.editing.as_pictures`.
Pictured = Picture | Tensor | np.ndarray | Sequence[Picture | Tensor | np.ndarray] | None
#: Gets the step, the number of steps, and all pictures so far, grey where nothing is made yet.
Callback = Callable[[int, int, list[Image.Image]], None]


def in_list(value: Any) -> list:
    """The items of a sequence, an array or a tensor; of anything else a list that holds it alone."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None or isinstance(value, int | float | str | Path | Image.Image):
        return [value]
    return [each.tolist() if hasattr(each, "tolist") else each for each in value]


class Request(NamedTuple):
    """What N images are made from."""

    labels: list[int] | None
    seeds: list[int]  # of the sampler
    edits: list[Edit] | None
    kept: Tensor | None  # [N, L], true where a token of the image is kept


@dataclass
class Pictures:
    """N pictures, and what their model says of them."""

    images: list[Image.Image]
    labels: list[int] | None  # classes
    seeds: list[int]
    confidence: Tensor  # [N, h, w], each token's log-probability in nats when it was taken; 0 for those given

    @property
    def log_likelihoods(self) -> list[float]:
        """The sum of each picture's :attr:`confidence`: comparable between pictures of the same mask."""
        return self.confidence.double().sum(dim=(1, 2)).tolist()

    def part(self, rows: Sequence[int]) -> "Pictures":
        """The pictures of some rows, in their order."""
        labels = self.labels and [self.labels[row] for row in rows]
        images, seeds = [self.images[row] for row in rows], [self.seeds[row] for row in rows]
        return Pictures(images, labels, seeds, self.confidence[list(rows)])

    def ranked(self) -> "Pictures":
        """All pictures, the most likely first."""
        scores = self.log_likelihoods
        return self.part(sorted(range(len(scores)), key=lambda row: -scores[row]))


# --------------------------------------------------------------------------------------------------------------------
# The pipeline.


class TokenBridgePipeline:
    """Makes pictures of classes, and makes parts of pictures anew.

    Args:
        model: in evaluation mode.
        tokenizer: the one that the model was trained on.
        precision: of autocast, as of ``--evaluate``: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        name: of the model, for messages.

    Raises:
        UserError: the model was trained on another tokenizer.
    """

    def __init__(
        self,
        model: TokenBridge,
        tokenizer: Tokenizer,
        precision: str = "bf16",
        name: str = "the model",
    ):
        self.model, self.tokenizer, self.precision = model, tokenizer, precision
        given = (tokenizer.embed_dim, tokenizer.stride)
        needed = (model.vae_embed_dim, model.config["vae_stride"])
        latent_factor = model.metadata.get("latent_factor", tokenizer.latent_factor)
        same_factor = math.isclose(tokenizer.latent_factor, latent_factor, rel_tol=1e-6)
        if given != needed or not same_factor:
            form = "{} latent channels, stride {}, latent factor {:.4g}".format
            raise UserError(
                f"the model was trained on another tokenizer: {tokenizer.source} has "
                f"{form(*given, tokenizer.latent_factor)}; the model needs {form(*needed, latent_factor)}"
            )
        if "vae_sha256" in model.metadata:
            check_tokenizer(model.metadata, tokenizer.info, name)
        #: Names of the classes; their numbers where the model knows none.
        self.class_names = readable(
            model.metadata.get("class_names") or [str(i) for i in range(model.class_num)]
        )
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
        """A pipeline on the CPU.

        Args:
            model, ema: see :meth:`TokenBridge.from_pretrained`.
            tokenizer: see :meth:`Tokenizer.from_pretrained`; by default ``vae`` or ``vae.ckpt`` beside the model's
                file, or what the run that wrote it names.
            precision: see the class.
            options: of the Hub: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

        Raises:
            UserError: there are no such files, they are damaged, or the tokenizer is another model's or not named.
        """
        from util.checkpoint.runs import read_run

        path, address = find_pretrained(model, **options)
        content = read_run(path)
        if tokenizer is None:
            options.pop("revision", None)  # the address has it
            tokenizer = own_tokenizer(path, address, content, **options)
        loaded = Tokenizer.from_pretrained(str(tokenizer))
        built: Any = TokenBridge.from_content(content, path, ema)
        return cls(built, loaded, precision, str(path))

    @property
    def device(self) -> torch.device:
        """Where pictures are made."""
        return self.model.device

    def to(self, device: torch.device | str) -> "TokenBridgePipeline":
        """This pipeline, moved to ``device``."""
        self.model.to(device)
        self.tokenizer.to(device).to(device, memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        *,
        seeds: int | Sequence[int] | None = None,
        image: Pictured = None,
        mask_image: Pictured = None,
        strength: float = 0.5,
        gen_seed: int = 0,
        batch_size: int = 64,
        callback: Callback | None = None,
        **sampling,
    ) -> Pictures:
        """Pictures, one for each item of the longest list among the first four arguments; single values go for all.

        Args:
            class_labels: numbers or names of classes; without them pictures are of any class.
            seeds: numbers from 0 to 2^32 - 1, by default 0, 1, ...: with seed n a class gives what ``--evaluate`` with
                ``gen_seed`` writes as image n, if that is of this class. Batches of another size change rounding only.
            image: to edit; cropped to the model's size as training images are. PIL images of any mode, paths, tensors
                ``[B, 3, H, W]`` or ``[3, H, W]``, or arrays ``[B, H, W, 3]`` or ``[H, W, 3]``, of bytes or in [0, 1].
            mask_image: of the image's size, white (or transparent) where it is made anew; the rest stays as it is, to
                the byte. As ``image``, with one channel. Without a mask the picture is a variation of the image.
            strength: share of the tokens that a variation makes anew, above 0 and at most 1.
            gen_seed: ``--gen_seed``.
            batch_size: pictures made at once; halved where memory is not enough. ``--eval_bsz`` is 64, too.
            callback: see :data:`Callback`. Without one nothing is waited for before a batch's end.
            sampling: :class:`models.sampling.SamplingOptions`: ``num_iter`` (at most one step a token is taken),
                ``cfg``, ``cfg_schedule``, ``temperature``, ``order``, ``confidence_noise``, ``first_place``; of the
                masked head ``head_steps``, ``head_order``.

        Raises:
            UserError: an unknown class, a number out of range, an image or mask that cannot be used, lists of different
                lengths, an unconditional pass of a model that was trained without one, values that are not finite, or
                too little memory for one picture.
        """
        options = self.checked_options(sampling, labeled=class_labels is not None)
        lists = {"class_labels": in_list(class_labels), "seeds": in_list(seeds)}
        lists |= {
            "image": as_pictures(image, "image"),
            "mask_image": as_pictures(mask_image, "mask_image"),
        }
        count = max(map(len, lists.values()))
        for name, values in lists.items():
            if len(values) not in (1, count):
                raise UserError(
                    f"{len(values)} {name} for {count} pictures: pass one, or one for each"
                )
            lists[name] = values * count if len(values) == 1 else values
        numbers = list(range(count)) if seeds is None else lists["seeds"]
        if (
            not all(isinstance(number, int) and 0 <= number < 2**32 for number in numbers)
            or gen_seed < 0
        ):
            raise UserError(
                f"seeds are whole numbers from 0 to {2**32 - 1}, and gen_seed is not negative"
            )
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: it must be above zero")
        labels = (
            None
            if class_labels is None
            else [self.class_number(each) for each in lists["class_labels"]]
        )
        edits, kept = self.edits(lists["image"], lists["mask_image"], strength, gen_seed, numbers)
        request = Request(labels, image_seeds(gen_seed, numbers), edits, kept)
        images, confidence = self.make_all(request, options, batch_size, callback)
        return Pictures(images, labels, numbers, confidence)

    # ----------------------------------------------------------------------------------------------------------------
    # What is asked for, checked.

    def checked_options(self, sampling: Mapping[str, Any], labeled: bool = True) -> SamplingOptions:
        """The options of sampling; UserError for those out of range. More steps than tokens are the same as all.

        Args:
            labeled: whether pictures are of given classes.
        """
        try:
            for name in ("cfg", "temperature", "confidence_noise"):
                if not math.isfinite(sampling.get(name, 0.0)):
                    raise ValueError(f"{name} must be a finite number, got {float(sampling[name])}")
            steps = min(sampling.get("num_iter", SamplingOptions.num_iter), self.model.seq_len)
            options = SamplingOptions(**{**sampling, "num_iter": steps})
            check_head_options(self.model.head, options)
            check_guidance(self.model.config["label_drop_prob"], options.cfg, labeled)
            return options
        except ValueError as error:
            raise UserError(str(error)) from error

    def class_number(self, label: int | str) -> int:
        """The number of a class by its name or number; UserError, which suggests others, if there is none."""
        if isinstance(label, str):
            return find_classes([label], self.class_names)[0]
        if not isinstance(label, int) or not 0 <= label < self.model.class_num:
            what = label if isinstance(label, int | float) else f"of type {type(label).__name__}"
            raise UserError(f"no class {what}: there are {self.model.class_num}, numbered from 0")
        return label

    def edits(
        self,
        images: Sequence,
        masks: Sequence,
        strength: float,
        gen_seed: int,
        numbers: Sequence[int],
    ) -> tuple[list[Edit] | None, Tensor | None]:
        """Images to edit, and which of their tokens ``[N, L]`` are kept; None without images."""
        if len({image is None for image in images}) > 1:
            raise UserError("pass an image for each picture, or none")
        if images[0] is None:
            if masks[0] is not None:
                raise UserError("a mask needs an image: pass both")
            return None, None
        if len({mask is None for mask in masks}) > 1:
            raise UserError("pass a mask for each image, or for none")
        size, length = self.model.config["img_size"], self.model.seq_len
        edits = [edit_of(image, mask, size) for image, mask in zip(images, masks, strict=True)]
        if masks[0] is not None:
            return edits, kept_tokens(
                torch.stack([edit.mask for edit in edits]), self.model.grid_size
            )
        if not 0 < strength <= 1:
            raise UserError(f"strength {float(strength)}: it lies above 0 and is at most 1")
        anew = max(1, round(strength * length))
        kept = (
            numbered_draws(gen_seed, numbers).uniform(length).argsort(dim=1).argsort(dim=1) >= anew
        )
        return edits, kept

    # ----------------------------------------------------------------------------------------------------------------
    # Making.

    def make_all(
        self, request: Request, options: SamplingOptions, batch_size: int, callback: Callback | None
    ) -> tuple[list[Image.Image], Tensor]:
        """All pictures and their confidence ``[N, h, w]``, in batches whose images have equally many kept tokens."""
        count, length = len(request.seeds), self.model.seq_len
        known = [0] * count if request.kept is None else request.kept.sum(dim=1).tolist()
        groups = [
            [row for row in range(count) if known[row] == number] for number in sorted(set(known))
        ]
        batches = [
            rows[i : i + batch_size] for rows in groups for i in range(0, len(rows), batch_size)
        ]
        size = self.model.config["img_size"]
        images: list[Image.Image] = [Image.new("RGB", (size, size), (UNKNOWN,) * 3)] * count
        confidence, done = torch.zeros(count, length), 0

        def steps_of(rows: Sequence[int]) -> int:
            return len(sampling_plan(options, length, length - known[rows[0]]))

        while batches:
            rows, *rest = batches
            steps = done + sum(map(steps_of, batches))

            def on_step(
                step: int,
                _: int,
                tokens: Tensor,
                unknown: Tensor,
                rows=rows,
                done=done,
                steps=steps,
            ) -> None:
                so_far = self.pictures(self.model.unpatchify(tokens), request, rows, unknown)
                for row, image in zip(rows, so_far, strict=True):
                    images[row] = image
                callback(done + step, steps, list(images))

            try:
                made, confidence[rows] = self.make(
                    request, rows, options, on_step if callback else None
                )
            except torch.OutOfMemoryError as error:
                if len(rows) == 1:
                    raise UserError(
                        f"{self.device} has too little memory for one picture"
                    ) from error
                log.info("%d pictures at once do not fit memory: making half as many", len(rows))
                half = len(rows) // 2
                batches = [rows[:half], rows[half:], *rest]
                continue
            for row, image in zip(rows, made, strict=True):
                images[row] = image
            done, batches = done + steps_of(rows), rest
        return images, confidence.unflatten(1, (self.model.grid_size, -1))

    def make(
        self, request: Request, rows: Sequence[int], options: SamplingOptions, on_step
    ) -> tuple[list, Tensor]:
        """The pictures of some rows, and their tokens' confidence ``[B, L]``, as ``--evaluate`` makes them."""
        given: dict[str, Any] = {"labels": request.labels and [request.labels[row] for row in rows]}
        if request.edits is not None:
            given["known_latents"] = self.encode(
                torch.stack([request.edits[row].seen for row in rows])
            )
            given["known_mask"] = request.kept[rows]
        with autocast(self.device, self.precision):
            latents, confidence = self.model.sample_tokens(
                len(rows), **asdict(options), **given, seeds=[request.seeds[row] for row in rows],
                return_confidence=True, on_step=on_step,
            )  # fmt: skip
        pictures, confidence = self.pictures(latents, request, rows), confidence.cpu()
        # Levels are finite whatever they are of; given latents and confidences show what is not.
        if "known_latents" in given:
            check_finite(given["known_latents"], "the tokenizer's encoder", "fp32")
        check_finite(confidence, "the transformer", self.precision)
        return pictures, confidence

    def encode(self, seen: Tensor) -> Tensor:
        """The most probable latents ``[B, C, h, w]`` of images ``[B, 3, S, S]`` in [-1, 1], scaled."""
        parts = seen.split(images_at_once(self.device, seen[0, 0].numel()))
        parts = [
            to_device(part, self.device).contiguous(memory_format=torch.channels_last)
            for part in parts
        ]
        with autocast(self.device, "fp32"):
            latents = torch.cat([self.tokenizer.encode(part).mode() for part in parts])
        return latents.contiguous()

    def pictures(
        self, latents: Tensor, request: Request, rows: Sequence[int], unknown: Tensor | None = None
    ) -> list[Image.Image]:
        """Scaled latents as pictures, put into the images that are edited; grey at ``unknown`` positions ``[B, N]``."""
        images = self.tokenizer.decode_images(latents, self.precision)
        mask = torch.ones(len(rows), *images.shape[2:], dtype=torch.bool)
        if request.edits is not None:
            original, mask = (torch.stack([request.edits[row][i] for row in rows]) for i in (0, 1))
            images = put_into(images, original, mask)
        if unknown is not None:
            grid, cell = self.model.grid_size, images.shape[-1] // self.model.grid_size
            missing = torch.zeros(len(rows), grid * grid, dtype=torch.bool).scatter(
                1, unknown.cpu(), True
            )
            missing = (
                missing.unflatten(1, (grid, grid))
                .repeat_interleave(cell, 1)
                .repeat_interleave(cell, 2)
            )
            images = images.masked_fill((missing & mask)[:, None], UNKNOWN)
        return to_pictures(images)
