"""Image bytes, PNG files with settings, image grids, and the similarity of two images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from util.data.sources import in_one_line
from util.errors import UserError
from util.files import written_whole
from util.precision import double

SETTINGS = "tokenbridge"  # keyword of the settings in a PNG
LINE = 16  # height of a caption in a grid, in pixels
GAP_COLOR = (64, 64, 64)  # between the images of a grid
KEPT_GRAY = 160  # of kept tokens in a map of confidence


def to_uint8(images: Tensor, rounding: str = "nearest") -> Tensor:
    """Return images in [-1, 1] as bytes, of the same shape. Values outside are clipped.

    Args:
        images: of any shape.
        rounding: round 255 (x + 1) / 2 to the ``nearest`` byte, or ``down``.
    """
    values = (255 * (images.float() + 1) / 2).clamp(0, 255)
    return (values.round() if rounding == "nearest" else values).to(torch.uint8)


def save_png(image: Tensor, path: str | Path) -> None:
    """Write bytes ``[3, H, W]`` as a PNG, atomically; :func:`util.files.flush_all` flushes it."""
    with written_whole(path, flush=False) as file:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, format="png")


def png_settings(settings: Mapping[str, Any]) -> PngInfo:
    """Return the ``pnginfo`` that stores the pipeline's arguments in a PNG, as JSON."""
    info = PngInfo()
    info.add_text(SETTINGS, json.dumps(settings))
    return info


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings that :func:`png_settings` stored in a PNG.

    Raises:
        UserError: the file is no PNG or holds no settings.
    """
    try:
        with Image.open(path) as image:
            settings = json.loads(image.info[SETTINGS])
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, Image.DecompressionBombError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"{path} holds no settings: choose a PNG that this project created and that no other "
            "program has saved since"
        )
    return settings


def image_grid(
    images: Sequence[Image.Image],
    columns: int,
    captions: Sequence[str] = (),
    titles: Sequence[str] = (),
    gap: int = 0,
) -> Image.Image:
    """Return one image that shows ``images`` of equal size in a grid, row by row.

    Args:
        columns: images per row; fewer if there are not as many images.
        captions: written below the images, shortened to their width; one for each, or none.
        titles: the same above the columns.
        gap: pixels around each image.
    """
    width, height = images[0].size
    columns = min(columns, len(images))
    cell_width, cell_height = width + gap, height + gap + (LINE if captions else 0)
    rows = -(-len(images) // columns)
    head = LINE if titles else 0
    size = (columns * cell_width + gap, head + rows * cell_height + gap)
    grid = Image.new("RGB", size, GAP_COLOR)
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles):
        draw_caption(draw, title, gap + column * cell_width, 0, width)
    for number, image in enumerate(images):
        left = gap + number % columns * cell_width
        top = head + gap + number // columns * cell_height
        grid.paste(image, (left, top))
        if captions:
            draw_caption(draw, captions[number], left, top + height, width)
    return grid


def draw_caption(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int) -> None:
    """Write a line of text, shortened to ``width`` pixels, on a white background."""
    text = in_one_line(text)
    draw.rectangle((left, top, left + width - 1, top + LINE - 1), fill=(255, 255, 255))
    shown = text
    while shown and draw.textlength(shown) > width - 2:
        text = text[:-1]
        shown = f"{text}..." if text else ""
    draw.text((left + 1, top + 2), shown, fill=(0, 0, 0))


def save_grid(
    images: Tensor,
    path: str | Path,
    columns: int,
    captions: Sequence[str] = (),
    titles: Sequence[str] = (),
    min_size: int = 64,
) -> None:
    """Write the :func:`image_grid` of bytes ``[N, 3, H, W]`` as a PNG.

    Args:
        path: the PNG file.
        columns, captions, titles: see :func:`image_grid`.
        min_size: smaller images are enlarged to at least this size, in pixels.
    """
    zoom = max(1, -(-min_size // images.shape[-1]))
    images = images.cpu().repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    with written_whole(path) as file:
        image_grid(pictures, columns, captions, titles, gap=2).save(file, format="png")


def confidence_maps(values: Tensor, size: int, kept: Tensor | None = None) -> Tensor:
    """Return maps ``[N, h, w]`` as colors, bytes ``[N, 3, size, size]``.

    The colors of each map go from dark (its minimum) to bright (its maximum).

    Args:
        kept: ``[N, h, w]``, true where a token was not predicted; these are gray.
    """
    import matplotlib  # importing it takes half a second

    hidden = torch.zeros_like(values, dtype=torch.bool) if kept is None else kept
    low = values.masked_fill(hidden, torch.inf).amin(dim=(1, 2), keepdim=True)
    high = values.masked_fill(hidden, -torch.inf).amax(dim=(1, 2), keepdim=True)
    shares = ((values - low) / (high - low).clamp(min=1e-12)).numpy()
    rgba = matplotlib.colormaps["viridis"](shares, bytes=True)
    colors = torch.from_numpy(rgba[..., :3].copy()).permute(0, 3, 1, 2)
    colors = colors.masked_fill(hidden[:, None], KEPT_GRAY)
    return F.interpolate(colors, size=(size, size), mode="nearest")


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity (SSIM) ``[N]`` of pairs of images (Wang et al. 2004).

    The Gaussian window has 11 pixels and a standard deviation of 1.5. As in the paper, the mean is
    over the positions at which the window lies inside the image. In images smaller than the window
    it is over all positions, with reflected edges.

    Args:
        a, b: bytes ``[N, 3, H, W]``.
    """
    a, b = double(a), double(b)
    if min(a.shape[2:]) < 11:
        a, b = (F.pad(image, [5] * 4, mode="reflect") for image in (a, b))
    window = torch.exp(-(torch.arange(-5, 6, device=a.device).double() ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    planes = torch.cat([a, b, a * a, b * b, a * b]).flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(F.conv2d(planes, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
    mean_a, mean_b, square_a, square_b, product = planes.unflatten(0, (5, *a.shape[:2])).squeeze(3)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = 2 * (product - mean_a * mean_b) + c2
    similarity = luminance * structure / (square_a - mean_a**2 + square_b - mean_b**2 + c2)
    return similarity.flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio ``[N]`` in dB of pairs of images; inf for equal ones.

    Args:
        a, b: bytes ``[N, 3, H, W]``.
    """
    mse = ((double(a) - double(b)) ** 2).flatten(1).mean(1)
    return 10 * torch.log10(255**2 / mse)
