"""Image editing: prepare image and mask for a model, and insert the generated parts.

No pixel under a mask affects the result. A resized pixel is masked if any pixel under the mask
contributes to it; masked pixels are blank when the tokenizer encodes the image; and seams are
blended by means of the pixels outside of the mask.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from util.crop import center_crop_arr
from util.data.datasets import to_pixels
from util.data.sources import over_white, read_upright
from util.errors import UserError

#: Largest number of pixels of an image or mask before it is cropped.
MAX_PIXELS = 2**26
#: Mean difference of bytes below which the visible part of a mask is taken for the image itself.
ALIKE = 16

# --------------------------------------------------------------------------------------------------
# Inputs.


class Edit(NamedTuple):
    """An image to edit, cropped to S x S pixels."""

    original: Tensor  # bytes [3, S, S]
    mask: Tensor  # [S, S], true where pixels are regenerated
    seen: Tensor  # [3, S, S] in [-1, 1], input of the tokenizer


Picture = Image.Image | str | Path


def as_pictures(value: Any, what: str) -> list:
    """Return the images that a caller passed, as PIL images and paths; ``[None]`` for None.

    Args:
        value: a PIL image, a path, a tensor ``[3, H, W]`` or ``[B, 3, H, W]``, an array ``[H, W,
            3]`` or ``[B, H, W, 3]``, or a list of such. Masks have one channel, or are ``[H, W]``.
            Values are bytes, booleans, or floats in [0, 1].
        what: its name in messages, ``image`` or ``mask_image``.

    Raises:
        UserError: it is something else, or of another shape or range.
    """
    if value is None or isinstance(value, Picture):
        return [value]
    if isinstance(value, list | tuple):
        return [picture for item in value for picture in as_pictures(item, what)]
    if not isinstance(value, Tensor | np.ndarray):
        raise UserError(
            f"{what}: pass PIL images, paths, tensors or arrays, not {type(value).__name__}"
        )
    pixels = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else value
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in ("uint8", "bool") and "float" not in dtype:
        raise UserError(f"{what} holds {dtype}: pass bytes (uint8), or floats from 0 to 1")
    channels, axis = (1 if what == "mask_image" else 3), (-3 if isinstance(value, Tensor) else -1)
    if channels == 1 and pixels.ndim == 2:
        pixels = np.expand_dims(pixels, axis)
    if pixels.ndim not in (3, 4) or pixels.shape[axis] != channels or not pixels.size:
        forms = (
            f"[{channels}, H, W] or [B, {channels}, H, W], "
            f"or an array [H, W, {channels}] or [B, H, W, {channels}]"
        )
        raise UserError(f"{what} has the shape {list(value.shape)}: pass a tensor {forms}")
    if dtype != "uint8":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # nor NaN
            raise UserError(
                f"{what} has values from {low:.4g} to {high:.4g}: pass floats from 0 to 1, "
                "or bytes (uint8)"
            )
        pixels = np.round(pixels.astype(np.float32) * 255)
    pixels = np.moveaxis(pixels, axis, -1).astype(np.uint8)
    batch = pixels if pixels.ndim == 4 else pixels[None]
    return [Image.fromarray(image[..., 0] if channels == 1 else image) for image in batch]


def opened(image: Picture, what: str) -> Image.Image:
    """Open an image by :func:`util.data.sources.read_upright`.

    Args:
        what: name of a PIL image, which has no path, in messages.

    Raises:
        UserError: it is damaged or too large.
    """
    return read_upright(image, what if isinstance(image, Image.Image) else "", MAX_PIXELS)


def read_mask(mask_image: Picture, image: Image.Image) -> Image.Image:
    """Return a mask as a gray image, white where pixels are regenerated, else black.

    A mask is stored as brightness, or as transparency: parts erased from a photograph are
    regenerated.

    Args:
        image: the photograph, RGB.

    Raises:
        UserError: the mask cannot be read, is not of the image's size, or its brightness
            contradicts its transparency.
    """
    mask = opened(mask_image, "the mask")
    if mask.size != image.size:
        sizes = [f"{width}x{height}" for width, height in (mask.size, image.size)]
        raise UserError(
            f"the mask has {sizes[0]} pixels, the image {sizes[1]}: make them equally large"
        )
    bright = np.asarray(mask.convert("RGB").convert("L")) > 127
    visible = np.ones_like(bright)
    if mask.mode == "RGBA":
        visible = np.asarray(mask.getchannel("A")) > 127
    if visible.all() or not visible.any():
        return Image.fromarray(bright).convert("L")
    # Opaque white means opposite things by brightness and by transparency, unless it belongs to the
    # photograph. A visible part of one color may have been drawn.
    left, own = (np.asarray(x.convert("RGB"), dtype=np.int16)[visible] for x in (mask, image))
    erased = np.abs(left - own).mean() < ALIKE and (left != left[0]).any()
    if bright[visible].any() and not erased:
        raise UserError(
            "the mask is ambiguous: by brightness, its white parts would be regenerated, by "
            "transparency, its transparent parts; save it in black and white without transparency, "
            "or erase the parts to regenerate from the image itself"
        )
    return Image.fromarray(~visible).convert("L")


def cropped(image: Image.Image, size: int) -> Image.Image:
    """Crop an image as training does: the center square, resized to ``size`` pixels.

    Raises:
        UserError: the image is too narrow.
    """
    try:
        return center_crop_arr(image, size)
    except (ValueError, MemoryError) as error:
        raise UserError(f"cannot crop the image ({error}); crop it yourself") from error


def edit_of(image: Picture, mask_image: Picture | None, size: int) -> Edit:
    """Read an image and its mask, cropped to ``size`` pixels each way.

    Args:
        image: a PIL image of any mode, or a path.
        mask_image: of the image's size, white or transparent where it is regenerated
            (:func:`read_mask`); None if all of the image may change.

    Raises:
        UserError: one of them cannot be read or is too large, their sizes differ, the mask is
            ambiguous, or it covers nothing or everything of the cropped image.
    """
    image = over_white(opened(image, "the image"))
    small = cropped(image, size)
    original = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    if mask_image is None:
        return Edit(original, torch.ones(size, size, dtype=torch.bool), to_pixels(small))
    white = read_mask(mask_image, image)
    # In floating point, small and negative contributions from under the mask remain visible.
    mask = torch.from_numpy(np.array(cropped(white.convert("F"), size)) != 0)
    if not mask.any() or mask.all():
        covers = "nothing: paint the parts to regenerate white"
        if mask.any():
            covers = "everything: remove image and mask"
        raise UserError(f"in the cropped square, the mask covers {covers}")
    return Edit(original, mask, to_pixels(small) * ~mask)


def outpainted(image: Picture, size: int, margin: int) -> tuple[Image.Image, Image.Image]:
    """Return the image's center square within a blank margin, and the mask of the margin.

    Raises:
        UserError: the image cannot be read or is too large, or no pixel lies within the margin.
    """
    inner = size - 2 * margin
    if margin < 1 or inner < 1:
        raise UserError(
            f"a margin of {margin} pixels in an image of {size}: choose 1 to {(size - 1) // 2}"
        )
    canvas, mask = Image.new("RGB", (size, size)), Image.new("L", (size, size), 255)
    canvas.paste(cropped(over_white(opened(image, "the image")), inner), (margin, margin))
    mask.paste(0, (margin, margin, margin + inner, margin + inner))
    return canvas, mask


# --------------------------------------------------------------------------------------------------
# Tokens.


def grown(mask: Tensor) -> Tensor:
    """Extend a mask ``[B, h, w]`` to all eight neighbors of each position."""
    return F.max_pool2d(mask.float(), 3, stride=1, padding=1) > 0


def kept_tokens(mask: Tensor, grid_size: int) -> Tensor:
    """Return the tokens ``[B, L]`` to keep under a mask of pixels ``[B, S, S]``.

    Neither they nor their neighbors have masked pixels: the tokenizer's convolutions extend across
    the border of a token.
    """
    return ~grown(F.adaptive_max_pool2d(mask.float(), grid_size)).flatten(1)


# --------------------------------------------------------------------------------------------------
# The result.


def put_into(made: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Combine ``made`` under the mask ``[B, S, S]`` with the unchanged ``original`` elsewhere.

    At the seam, ``made`` is shifted by its difference from ``original`` just outside of the mask.
    The shift decreases within the mask.

    Args:
        made, original: bytes ``[B, 3, S, S]``.
    """
    # Loads torch._dynamo, which takes longer than torch
    from torchvision.transforms.functional import gaussian_blur

    outside, sigma = (~mask[:, None]).float(), made.shape[-1] / 32
    kernel = 2 * int(3 * sigma) + 1
    difference = gaussian_blur((original.float() - made.float()) * outside, kernel, sigma)
    weight = gaussian_blur(outside, kernel, sigma).clamp(min=0.5)  # 0.5 at a straight seam
    blended = (made.float() + difference / weight).round().clamp(0, 255).to(torch.uint8)
    return torch.where(mask[:, None], blended, original)
