"""PSNR, SSIM and grids of pictures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from util.data.images import LINE, confidence_maps, psnr, save_grid, ssim, to_uint8


def test_psnr_is_the_textbook_figure():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[1] += 5
    assert psnr(a, b).tolist() == [math.inf, pytest.approx(20 * math.log10(255 / 5))]


def test_bytes_are_the_nearest_or_those_below():
    values = (torch.tensor([-300.0, 0.0, 0.4, 0.6, 99.5001, 254.9, 255.0, 300.0]) / 127.5) - 1
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 100, 255, 255, 255]
    assert to_uint8(values, "down").tolist() == [0, 0, 0, 0, 99, 254, 255, 255]


@pytest.mark.parametrize("shape", [(11, 11), (40, 40), (13, 64)])
def test_ssim_is_scikit_images(shape):
    a = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    b = (a.float() * 0.8 + 20 * torch.rand(a.shape)).to(torch.uint8)
    b[1] = 77
    for x, y, value in zip(a, b, ssim(a, b), strict=True):
        expected = structural_similarity(
            x.numpy(),
            y.numpy(),
            channel_axis=0,
            data_range=255,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "expected"), [(8, 0.78527249), (10, 0.78507948), (16, 0.78400932)]
)
def test_ssim_is_what_torchmetrics_computes(size, expected):
    """Numbers of torchmetrics 1.9, which earlier versions used; all positions of images smaller than the window."""
    a = (torch.arange(3 * size * size).view(1, 3, size, size) * 37 % 256).byte()
    b = (a // 2 + 40).byte()
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert ssim(a, a).item() == pytest.approx(1)


def test_grids_hold_every_image_where_it_belongs(tmp_path):
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8) * 40
    long = "a name that is longer than its image is wide"
    captions = ["a", "b", "c", "d", "two\nlines", long]
    for names in ({}, {"titles": ["a", "b", long]}, {"captions": captions}):
        save_grid(images, tmp_path / "grid.png", columns=3, **names, min_size=16)
        line, head = (LINE if name in names else 0 for name in ("captions", "titles"))
        with Image.open(tmp_path / "grid.png") as grid:
            assert grid.size == (3 * 18 + 2, 2 * (18 + line) + 2 + head)
            pixels = np.array(grid)
        texts = [pixels[:head, 2 + 18 * column :][:, :16] for column in range(3)]
        for number in range(6):
            top, left = head + 2 + (18 + line) * (number // 3), 2 + 18 * (number % 3)
            assert (pixels[top : top + 16, left : left + 16] == 40 * number).all()
            texts.append(pixels[top + 16 : top + 16 + line, left : left + 16])
            assert (pixels[top : top + 16 + line, left + 16 : left + 18] == 64).all()
        shares = [(text < 128).mean() for text in texts if text.size]  # black letters on white
        assert len(shares) == 3 * ("titles" in names) + 6 * ("captions" in names)
        assert all(0 < share < 0.5 for share in shares)


def test_kept_tokens_are_gray_in_a_map_of_confidence():
    values = torch.tensor([[[-4.0, 0.0], [-2.0, -3.0]]])
    kept = torch.tensor([[[False, True], [False, False]]])
    colors = confidence_maps(values, 2, kept)[0]
    assert colors[:, 0, 1].tolist() == [160, 160, 160]
    assert colors[:, 0, 0].tolist() == [68, 1, 84] and colors[1, 1, 0] == 231  # the ends of viridis
    every = torch.ones(1, 2, 2, dtype=torch.bool)
    assert (confidence_maps(values, 2, every) == 160).all()
