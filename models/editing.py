"""Image editing: crop images and masks to the model's size, and insert generated pixels.

The result is independent of the pixels under the mask. A resized pixel that mixes masked pixels is
masked, too. Masked pixels are blank when the tokenizer encodes the image. At the seam, colors are
adjusted with known pixels outside the mask only.
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

#: Largest number of pixels of an image or mask before cropping.
MAX_PIXELS = 2**26
#: Largest mean difference, in bytes, of the rest of an erased photograph from the image itself.
ALIKE = 16

# --------------------------------------------------------------------------------------------------
# Images and masks of the caller


class Edit(NamedTuple):
    """An image to edit, cropped to S x S pixels."""

    original: Tensor  # bytes [3, S, S]
    mask: Tensor  # [S, S], true where pixels are regenerated
    seen: Tensor  # [3, S, S] in [-1, 1], the input of the tokenizer


ImageOrPath = Image.Image | str | Path

#: Regions that can be named instead of a mask: left, top, right, bottom as shares of the size.
REGIONS = {
    "upper half": (0, 0, 1, 0.5),
    "lower half": (0, 0.5, 1, 1),
    "left half": (0, 0, 0.5, 1),
    "right half": (0.5, 0, 1, 1),
    "middle": (0.25, 0.25, 0.75, 0.75),
}


def region_box(region: str, size: int) -> tuple[int, int, int, int]:
    """Return the left, top, right and bottom edge of a region in an image of ``size`` pixels.

    Args:
        region: a name in :data:`REGIONS`.
    """
    left, top, right, bottom = (round(share * size) for share in REGIONS[region])
    return left, top, right, bottom


def as_images(value: Any, name: str) -> list:
    """Return the images that a caller passed, as PIL images and paths; ``[None]`` for None.

    Args:
        value: a PIL image, a path, a tensor ``[3, H, W]`` or ``[B, 3, H, W]``, an array
            ``[H, W, 3]`` or ``[B, H, W, 3]``, or a list of these. Masks have one channel, or are
            ``[H, W]``. Values are bytes, booleans, or floats in [0, 1].
        name: the argument, ``image`` or ``mask_image``.

    Raises:
        UserError: the type, shape or range is another one.
    """
    if value is None or isinstance(value, ImageOrPath):
        return [value]
    if isinstance(value, list | tuple):
        return [image for item in value for image in as_images(item, name)]
    if not isinstance(value, Tensor | np.ndarray):
        raise UserError(
            f"{name}: pass PIL images, paths, tensors or arrays, not {type(value).__name__}"
        )
    pixels = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else value
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in ("uint8", "bool") and "float" not in dtype:
        raise UserError(f"{name} has type {dtype}: pass bytes (uint8), or floats from 0 to 1")
    channels = 1 if name == "mask_image" else 3
    axis = -3 if isinstance(value, Tensor) else -1
    if channels == 1 and pixels.ndim == 2:
        pixels = np.expand_dims(pixels, axis)
    if pixels.ndim not in (3, 4) or pixels.shape[axis] != channels or not pixels.size:
        raise UserError(
            f"{name} has the shape {list(value.shape)}: pass a tensor [{channels}, H, W] or "
            f"[B, {channels}, H, W], or an array [H, W, {channels}] or [B, H, W, {channels}]"
        )
    if dtype != "uint8":
        low = float(pixels.min())
        high = float(pixels.max())
        # Also refuses NaN.
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"{name} has values from {low:.4g} to {high:.4g}: pass floats from 0 to 1, or "
                "bytes (uint8)"
            )
        pixels = np.round(pixels.astype(np.float32) * 255)
    pixels = np.moveaxis(pixels, axis, -1).astype(np.uint8)
    batch = pixels if pixels.ndim == 4 else pixels[None]
    return [Image.fromarray(item[..., 0] if channels == 1 else item) for item in batch]


def open_image(image: ImageOrPath, name: str) -> Image.Image:
    """Return an image as :func:`util.data.sources.read_upright` reads it.

    Args:
        name: the name in messages of an image without a path.

    Raises:
        UserError: the image is damaged or too large.
    """
    return read_upright(image, name if isinstance(image, Image.Image) else "", MAX_PIXELS)


def read_mask(mask_image: ImageOrPath, image: Image.Image) -> Image.Image:
    """Return a mask as a gray image: white where pixels are regenerated, else black.

    The mask is the brightness of ``mask_image``. If parts of it are transparent, the mask is its
    transparency: parts that were erased from a photograph are regenerated.

    Args:
        image: the photograph, RGB.

    Raises:
        UserError: the mask cannot be read, has another size than the image, or its brightness
            contradicts its transparency.
    """
    mask = open_image(mask_image, "the mask")
    if mask.size != image.size:
        mask_size, image_size = (f"{width}x{height}" for width, height in (mask.size, image.size))
        raise UserError(
            f"the mask has {mask_size} pixels, the image {image_size}: make them equally large"
        )
    bright = np.asarray(mask.convert("RGB").convert("L")) > 127
    visible = np.ones_like(bright)
    if mask.mode == "RGBA":
        visible = np.asarray(mask.getchannel("A")) > 127
    if visible.all() or not visible.any():
        return Image.fromarray(bright).convert("L")
    # Visible white is ambiguous, unless it belongs to the photograph. A single color is a drawing.
    rest = np.asarray(mask.convert("RGB"), dtype=np.int16)[visible]
    photograph = np.asarray(image.convert("RGB"), dtype=np.int16)[visible]
    is_erased_photograph = np.abs(rest - photograph).mean() < ALIKE and (rest != rest[0]).any()
    if bright[visible].any() and not is_erased_photograph:
        raise UserError(
            "the mask is ambiguous: its brightness selects the white parts, its transparency the "
            "transparent parts; save it in black and white without transparency, or erase the "
            "parts from the image itself"
        )
    return Image.fromarray(~visible).convert("L")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the center square of an image, resized to ``size`` as training images are.

    Raises:
        UserError: the image is too narrow.
    """
    try:
        return center_crop_arr(image, size)
    except (ValueError, MemoryError) as error:
        raise UserError(f"cannot crop the image ({error}); crop it yourself") from error


def prepare_edit(image: ImageOrPath, mask_image: ImageOrPath | None, size: int) -> Edit:
    """Return an image and its mask, cropped to ``size`` x ``size`` pixels.

    Args:
        image: a PIL image of any mode, or a path.
        mask_image: of the image's size, see :func:`read_mask`; or a name in :data:`REGIONS`, a
            part of the cropped image. None selects all pixels.

    Raises:
        UserError: a file cannot be read or is too large, the sizes differ, the mask is ambiguous,
            or it covers all or nothing of the cropped image.
    """
    full_image = over_white(open_image(image, "the image"))
    small = center_crop(full_image, size)
    original = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    if mask_image is None:
        return Edit(original, torch.ones(size, size, dtype=torch.bool), to_pixels(small))
    if isinstance(mask_image, str) and mask_image in REGIONS:
        left, top, right, bottom = region_box(mask_image, size)
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[top:bottom, left:right] = True
    elif isinstance(mask_image, str) and not Path(mask_image).exists():
        raise UserError(
            f"there is no image {mask_image}, and no region of this name: {', '.join(REGIONS)}"
        )
    else:
        full_mask = read_mask(mask_image, full_image)
        # Resized as floating point, which keeps all shares of masked pixels: small ones, and the
        # negative ones of bicubic interpolation.
        mask = torch.from_numpy(np.array(center_crop(full_mask.convert("F"), size)) != 0)
    if mask.all():
        raise UserError(
            "the mask covers all of the cropped image: pass neither an image nor a mask to "
            "generate a whole image"
        )
    if not mask.any():
        raise UserError(
            "the mask covers nothing of the cropped image: the parts to regenerate are white, 255"
        )
    return Edit(original, mask, to_pixels(small) * ~mask)


def outpainted(image: ImageOrPath, size: int, margin: int) -> tuple[Image.Image, Image.Image]:
    """Return the image within a blank margin, and the mask of the margin.

    Args:
        size: height and width of the results in pixels; the image's center square is resized to
            ``size - 2 * margin``.

    Raises:
        UserError: the image cannot be read or is too large, or the margin is too small or large.
    """
    inner = size - 2 * margin
    if margin < 1 or inner < 1:
        raise UserError(
            f"the margin of {margin} pixels does not fit an image of {size} pixels: choose 1 to "
            f"{(size - 1) // 2}"
        )
    canvas = Image.new("RGB", (size, size))
    canvas.paste(center_crop(over_white(open_image(image, "the image")), inner), (margin, margin))
    mask = Image.new("L", (size, size), 255)
    mask.paste(0, (margin, margin, margin + inner, margin + inner))
    return canvas, mask


# --------------------------------------------------------------------------------------------------
# Tokens


def grown(mask: Tensor) -> Tensor:
    """Return a mask ``[B, h, w]`` extended to all eight neighbors of masked positions."""
    return F.max_pool2d(mask.float(), 3, stride=1, padding=1) > 0


def kept_tokens(mask: Tensor, grid_size: int) -> Tensor:
    """Return which tokens ``[B, L]`` are kept under a mask of pixels ``[B, S, S]``.

    A token is kept if neither it nor a neighbor contains masked pixels: the tokenizer's
    convolutions mix blank pixels into neighboring tokens.
    """
    return ~grown(F.adaptive_max_pool2d(mask.float(), grid_size)).flatten(1)


# --------------------------------------------------------------------------------------------------
# Generated pixels


def insert_generated(generated: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Return ``original`` with the masked pixels replaced by ``generated``, without visible seams.

    At the seam, ``generated`` is shifted by its difference from ``original`` just outside the mask.
    The shift fades within the mask.

    Args:
        generated, original: bytes ``[B, 3, S, S]``.
        mask: ``[B, S, S]``.
    """
    # Loads torch._dynamo, which takes longer than torch.
    from torchvision.transforms.functional import gaussian_blur

    outside = (~mask[:, None]).float()
    sigma = generated.shape[-1] / 32
    kernel = 2 * int(3 * sigma) + 1
    difference = gaussian_blur((original.float() - generated.float()) * outside, kernel, sigma)
    # The blurred `outside` is 0.5 at a straight seam, and less within the mask.
    shift = difference / gaussian_blur(outside, kernel, sigma).clamp(min=0.5)
    shifted = (generated.float() + shift).round().clamp(0, 255).to(torch.uint8)
    return torch.where(mask[:, None], shifted, original)
