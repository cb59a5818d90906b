"""Images of which a part is made anew: cropped and masked as a model takes them, and what it made put into them.

Nothing under a mask gets into the result. What a resized pixel mixes from under the mask makes it masked, too; masked
pixels are blank when the tokenizer encodes the rest; and seams are evened out by what is known outside of the mask.
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

#: Pixels that an image or mask may have before it is cropped.
MAX_PIXELS = 2**26
#: Mean difference of bytes below which what is left of an erased photograph is taken for the image's own pixels.
ALIKE = 16

# --------------------------------------------------------------------------------------------------------------------
# What is given.


class Edit(NamedTuple):
    """An image to edit, cropped to S x S pixels."""

    original: Tensor  # bytes [3, S, S]
    mask: Tensor  # [S, S], true where pixels are made anew
    seen: Tensor  # [3, S, S] in [-1, 1], what the tokenizer sees


Picture = Image.Image | str | Path


def as_pictures(value: Any, what: str) -> list:
    """Return the images that a caller passed as pictures and paths; ``[None]`` for None.

    Args:
        value: a picture, a path, a tensor ``[3, H, W]`` or ``[B, 3, H, W]``, an array ``[H, W, 3]`` or
            ``[B, H, W, 3]``, or a list of such. Masks have one channel, or are ``[H, W]``. Values are bytes, booleans,
            or floats in [0, 1].
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
        forms = f"[{channels}, H, W] or [B, {channels}, H, W], or an array [H, W, {channels}] or [B, H, W, {channels}]"
        raise UserError(f"{what} has the shape {list(value.shape)}: pass a tensor {forms}")
    if dtype != "uint8":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # nor NaN
            raise UserError(
                f"{what} has values from {low:.4g} to {high:.4g}: pass floats from 0 to 1, or bytes (uint8)"
            )
        pixels = np.round(pixels.astype(np.float32) * 255)
    pixels = np.moveaxis(pixels, axis, -1).astype(np.uint8)
    batch = pixels if pixels.ndim == 4 else pixels[None]
    return [Image.fromarray(each[..., 0] if channels == 1 else each) for each in batch]


def opened(image: Picture, what: str) -> Image.Image:
    """An image as :func:`util.data.sources.read_upright` reads it.

    Raises:
        UserError: it is damaged or too large; a picture without a path is called ``what``.
    """
    return read_upright(image, what if isinstance(image, Image.Image) else "", MAX_PIXELS)


def read_mask(mask_image: Picture, image: Image.Image) -> Image.Image:
    """Return a mask as a gray image, white where pixels are made anew, else black.

    A mask has this in its brightness, or in its transparency: parts erased from a photograph are made anew.

    Args:
        image: the photograph, RGB.

    Raises:
        UserError: the mask cannot be read, is not of the image's size, or its brightness contradicts its transparency.
    """
    mask = opened(mask_image, "the mask")
    if mask.size != image.size:
        sizes = [f"{width}x{height}" for width, height in (mask.size, image.size)]
        raise UserError(
            f"the mask has {sizes[0]} pixels, the image {sizes[1]}: make them equally large"
        )
    bright = np.asarray(mask.convert("RGB").convert("L")) > 127
    visible = (
        np.asarray(mask.getchannel("A")) > 127 if mask.mode == "RGBA" else np.ones_like(bright)
    )
    if visible.all() or not visible.any():
        return Image.fromarray(bright).convert("L")
    # White that is not transparent means opposite things, unless it belongs to the photograph. One color may be drawn.
    left, own = (np.asarray(each.convert("RGB"), dtype=np.int16)[visible] for each in (mask, image))
    erased = np.abs(left - own).mean() < ALIKE and (left != left[0]).any()
    if bright[visible].any() and not erased:
        raise UserError(
            "the mask is ambiguous: by its brightness, what is white would be made anew, by its transparency, what is "
            "transparent; save it without transparency (black and white), or erase those parts from the image itself"
        )
    return Image.fromarray(~visible).convert("L")


def cropped(image: Image.Image, size: int) -> Image.Image:
    """The training images' crop: the centre square, resized to ``size``; UserError for images too narrow."""
    try:
        return center_crop_arr(image, size)
    except (ValueError, MemoryError) as error:
        raise UserError(f"cannot crop the image ({error}); crop it yourself") from error


def edit_of(image: Picture, mask_image: Picture | None, size: int) -> Edit:
    """An image and its mask, as pictures of any mode or as paths, cropped to ``size`` pixels each way.

    Args:
        mask_image: of the image's size, white or transparent where it is made anew (:func:`read_mask`); None if all of
            the image may change.

    Raises:
        UserError: one of them cannot be read or is too large, their sizes differ, the mask is ambiguous, or it covers
            nothing or everything of what is left after cropping.
    """
    image = over_white(opened(image, "the image"))
    small = cropped(image, size)
    original = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    if mask_image is None:
        return Edit(original, torch.ones(size, size, dtype=torch.bool), to_pixels(small))
    white = read_mask(mask_image, image)
    # As floating point, which keeps what a pixel takes from under the mask, be it little or, with bicubic's, negative.
    mask = torch.from_numpy(np.array(cropped(white.convert("F"), size)) != 0)
    if not mask.any() or mask.all():
        covers = (
            "everything: leave image and mask out"
            if mask.any()
            else "nothing: paint white what is made anew"
        )
        raise UserError(f"in the square that is left after cropping, the mask covers {covers}")
    return Edit(original, mask, to_pixels(small) * ~mask)


def outpainted(image: Picture, size: int, margin: int) -> tuple[Image.Image, Image.Image]:
    """A canvas of ``size`` pixels each way that holds the image's centre square within a blank margin, and its mask.

    Raises:
        UserError: the image cannot be read or is too large, or no pixel lies within the margin.
    """
    inner = size - 2 * margin
    if margin < 1 or inner < 1:
        raise UserError(
            f"a margin of {margin} pixels in a picture of {size}: choose 1 to {(size - 1) // 2}"
        )
    canvas, mask = Image.new("RGB", (size, size)), Image.new("L", (size, size), 255)
    canvas.paste(cropped(over_white(opened(image, "the image")), inner), (margin, margin))
    mask.paste(0, (margin, margin, margin + inner, margin + inner))
    return canvas, mask


# --------------------------------------------------------------------------------------------------------------------
# Tokens.


def grown(mask: Tensor) -> Tensor:
    """A mask ``[B, h, w]`` and all eight neighbours of what it covers."""
    return F.max_pool2d(mask.float(), 3, stride=1, padding=1) > 0


def kept_tokens(mask: Tensor, grid_size: int) -> Tensor:
    """Tokens ``[B, L]`` to keep under a mask of pixels ``[B, S, S]``: without masked pixels, also in their neighbours.

    The tokenizer's convolutions carry what is blank across a token's border.
    """
    return ~grown(F.adaptive_max_pool2d(mask.float(), grid_size)).flatten(1)


# --------------------------------------------------------------------------------------------------------------------
# What is made.


def put_into(made: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Bytes ``[B, 3, S, S]``: ``made`` under the mask ``[B, S, S]``, elsewhere ``original``, unchanged.

    At the seam, ``made`` is shifted by what it differs from ``original`` just outside; the shift fades within the mask.
    """
    # Loads torch._dynamo, which takes longer than torch
    from torchvision.transforms.functional import gaussian_blur

    outside, sigma = (~mask[:, None]).float(), made.shape[-1] / 32
    kernel = 2 * int(3 * sigma) + 1
    difference = gaussian_blur((original.float() - made.float()) * outside, kernel, sigma)
    shift = difference / gaussian_blur(outside, kernel, sigma).clamp(
        min=0.5
    )  # 0.5 at a straight seam, then less
    evened = (made.float() + shift).round().clamp(0, 255).to(torch.uint8)
    return torch.where(mask[:, None], evened, original)
