"""Images: conversion to bytes, files and grids; settings within PNGs; similarity of two images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from util.errors import UserError
from util.files import written_whole
from util.precision import double

SETTINGS = "tokenbridge"  # keyword of the text in PNGs


def to_uint8(images: Tensor, rounding: str = "nearest") -> Tensor:
    """Images in [-1, 1] (clipped) to bytes, 255 (x + 1) / 2 rounded to the ``nearest`` or ``down``; any shape."""
    values = (255 * (images.float() + 1) / 2).clamp(0, 255)
    return (values.round() if rounding == "nearest" else values).to(torch.uint8)


def save_png(image: Tensor, path: str | Path) -> None:
    """Writes bytes ``[3, H, W]`` as a PNG, whole or not at all."""
    with written_whole(path) as file:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, format="png")


def png_settings(settings: Mapping[str, Any]) -> PngInfo:
    """What to save a PNG with (``pnginfo``), so that it holds the arguments of the pipeline that made it, as JSON."""
    info = PngInfo()
    info.add_text(SETTINGS, json.dumps(settings))
    return info


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a PNG of :func:`png_settings` holds; UserError if it holds none."""
    try:
        with Image.open(path) as image:
            settings = json.loads(image.info[SETTINGS])
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, Image.DecompressionBombError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"{path} holds no settings: choose a PNG that this project made and no other program has saved"
        )
    return settings


def save_grid(
    images: Tensor, path: str | Path, columns: int, titles: Sequence[str] = (), min_size: int = 64
) -> None:
    """Writes bytes ``[N, 3, H, W]`` as one picture, row by row, each column below its title.

    Images of fewer than ``min_size`` pixels are enlarged.
    """
    from torchvision.utils import make_grid  # loads torch._dynamo: only when it is needed

    zoom = max(1, -(-min_size // images.shape[-1]))
    images = images.cpu().repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=64).permute(1, 2, 0).numpy()
    margin = 16 if titles else 0
    picture = Image.fromarray(np.pad(grid, ((margin, 0), (0, 0), (0, 0)), constant_values=255))
    for column, title in enumerate(titles):
        ImageDraw.Draw(picture).text(
            (4 + column * (images.shape[-1] + 2), 2), title, fill=(0, 0, 0)
        )
    with written_whole(path) as file:
        picture.save(file, format="png")


def confidence_maps(values: Tensor, size: int) -> Tensor:
    """Maps ``[N, h, w]`` as coloured bytes ``[N, 3, size, size]``, each from dark (its lowest value) to bright."""
    import matplotlib  # takes half a second: only when it is needed

    low, high = values.amin(dim=(1, 2), keepdim=True), values.amax(dim=(1, 2), keepdim=True)
    shares = ((values - low) / (high - low).clamp(min=1e-12)).numpy()
    colours = torch.from_numpy(
        matplotlib.colormaps["viridis"](shares, bytes=True)[..., :3].copy()
    ).permute(0, 3, 1, 2)
    return F.interpolate(colours, size=(size, size), mode="nearest")


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity ``[N]`` of pairs of byte images ``[N, 3, H, W]`` (Wang et al. 2004).

    The Gaussian window has 11 pixels and standard deviation 1.5. As in the paper, only positions count where all of the
    window lies inside the image; in images smaller than the window, all positions count, and edges are reflected.
    """
    a, b = double(a), double(b)
    if min(a.shape[2:]) < 11:
        a, b = (F.pad(image, [5] * 4, mode="reflect") for image in (a, b))
    window = torch.exp(-(torch.arange(-5, 6, device=a.device).double() ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    planes = torch.cat([a, b, a * a, b * b, a * b]).flatten(0, 1).unsqueeze(1)  # one channel each
    planes = F.conv2d(F.conv2d(planes, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
    mean_a, mean_b, square_a, square_b, product = planes.unflatten(0, (5, *a.shape[:2])).squeeze(3)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = 2 * (product - mean_a * mean_b) + c2
    similarity = luminance * structure / (square_a - mean_a**2 + square_b - mean_b**2 + c2)
    return similarity.flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio ``[N]`` in dB of pairs of byte images ``[N, 3, H, W]``; inf for equal ones."""
    mse = ((double(a) - double(b)) ** 2).flatten(1).mean(1)
    return 10 * torch.log10(255**2 / mse)
