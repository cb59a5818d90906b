"""The centre crop."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from util.crop import center_crop_arr


@settings(deadline=None, max_examples=50)
@given(st.integers(8, 120), st.integers(8, 120), st.integers(1, 40))
def test_crops_have_the_size_asked_for(width, height, size):
    assert center_crop_arr(Image.new("RGB", (width, height)), size).size == (size, size)


def test_crops_halve_by_box_then_resize_bicubically_to_the_centre():
    pixels = np.random.RandomState(0).randint(0, 255, (90, 70, 3), dtype=np.uint8)
    # 70 is at least twice 16, and so is 35: halved to 17 x 22, then resized to 16 x 21, of which rows 2 to 17 are kept.
    expected = (
        Image.fromarray(pixels)
        .resize((35, 45), Image.Resampling.BOX)
        .resize((17, 22), Image.Resampling.BOX)
    )
    expected = np.array(expected.resize((16, 21), Image.Resampling.BICUBIC))[2:18]
    assert np.array_equal(np.array(center_crop_arr(Image.fromarray(pixels), 16)), expected)
    square = Image.fromarray(pixels[:16, :16])
    assert np.array_equal(np.array(center_crop_arr(square, 16)), pixels[:16, :16])
