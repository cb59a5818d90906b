"""ADM's center crop (Dhariwal and Nichol 2021), on which the ImageNet statistics are based."""

from PIL import Image


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """Resize an image by its shorter side, and return its center ``image_size`` x ``image_size``.

    While the shorter side is at least twice ``image_size``, the image is halved with a box filter.
    Then it is resized bicubically.

    Raises:
        ValueError: the image is so narrow that the resized one would exceed Pillow's pixel limit.
    """
    while min(pil_image.size) >= 2 * image_size:
        half = pil_image.width // 2, pil_image.height // 2
        pil_image = pil_image.resize(half, resample=Image.Resampling.BOX)
    scale = image_size / min(pil_image.size)
    width, height = (round(side * scale) for side in pil_image.size)
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{pil_image.width}x{pil_image.height} pixels are too narrow for {image_size}"
        )
    pil_image = pil_image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left = (width - image_size) // 2
    top = (height - image_size) // 2
    return pil_image.crop((left, top, left + image_size, top + image_size))
