"""Images of which a part is made anew: cropped and masked as a model takes them, and what it made put into them.

Nothing under a mask gets into the result. What a resized pixel mixes from under the mask makes it masked, too; masked
pixels are blank when the tokenizer encodes the rest; and seams are evened out by what is known outside of the mask.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from util.crop import center_crop_arr
from util.errors import UserError
from util.loader import to_pixels
from util.sources import read_image

#: Pixels that an image or mask may have before it is cropped.
MAX_PIXELS = 2**26

# --------------------------------------------------------------------------------------------------------------------
# What is given.


class Edit(NamedTuple):
    """An image to edit, cropped to S x S pixels."""

    original: Tensor  # bytes [3, S, S]
    mask: Tensor  # [S, S], true where pixels are made anew
    seen: Tensor  # [3, S, S] in [-1, 1], what the tokenizer sees


def opened(image: Image.Image | str | Path, what: str) -> Image.Image:
    """An image as RGB; UserError, which calls a picture without a path ``what``, if it is damaged or too large."""
    return read_image(image, what if isinstance(image, Image.Image) else "", MAX_PIXELS)


def cropped(image: Image.Image, size: int) -> Image.Image:
    """The training images' crop: the centre square, resized to ``size``; UserError for images too narrow."""
    try:
        return center_crop_arr(image, size)
    except (ValueError, MemoryError) as error:
        raise UserError(f"cannot crop the image ({error}); crop it yourself") from error


def edit_of(image: Image.Image | str | Path, mask_image: Image.Image | str | Path | None, size: int) -> Edit:
    """An image and its mask, as pictures of any mode or as paths, cropped to ``size`` pixels each way.

    Args:
        mask_image: of the image's size, white where it is made anew; None if all of the image may change.

    Raises:
        UserError: one of them cannot be read or is too large, their sizes differ, or the mask covers nothing or
            everything of what is left after cropping.
    """
    image = opened(image, "the image")
    small = cropped(image, size)
    original = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    if mask_image is None:
        return Edit(original, torch.ones(size, size, dtype=torch.bool), to_pixels(small))
    white = opened(mask_image, "the mask").convert("L").point([0] * 128 + [255] * 128)
    if white.size != image.size:
        sizes = [f"{width}x{height}" for width, height in (white.size, image.size)]
        raise UserError(f"the mask has {sizes[0]} pixels, the image {sizes[1]}: make them equally large")
    # As floating point, which keeps what a pixel takes from under the mask, be it little or, with bicubic's, negative.
    mask = torch.from_numpy(np.array(cropped(white.convert("F"), size)) != 0)
    if not mask.any() or mask.all():
        covers = "everything: leave image and mask out" if mask.any() else "nothing: paint white what is made anew"
        raise UserError(f"in the square that is left after cropping, the mask covers {covers}")
    return Edit(original, mask, to_pixels(small) * ~mask)


def outpainted(image: Image.Image | str | Path, size: int, margin: int) -> tuple[Image.Image, Image.Image]:
    """A canvas of ``size`` pixels each way that holds the image's centre square within a blank margin, and its mask.

    Raises:
        UserError: the image cannot be read or is too large, or no pixel lies within the margin.
    """
    inner = size - 2 * margin
    if margin < 1 or inner < 1:
        raise UserError(f"a margin of {margin} pixels in a picture of {size}: choose 1 to {(size - 1) // 2}")
    canvas, mask = Image.new("RGB", (size, size)), Image.new("L", (size, size), 255)
    canvas.paste(cropped(opened(image, "the image"), inner), (margin, margin))
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
    outside, sigma = (~mask[:, None]).float(), made.shape[-1] / 32
    kernel = 2 * int(3 * sigma) + 1
    difference = gaussian_blur((original.float() - made.float()) * outside, kernel, sigma)
    shift = difference / gaussian_blur(outside, kernel, sigma).clamp(min=0.5)  # 0.5 at a straight seam, then less
    evened = (made.float() + shift).round().clamp(0, 255).to(torch.uint8)
    return torch.where(mask[:, None], evened, original)
