"""ADM's centre crop (Dhariwal and Nichol 2021), the crop behind the published ImageNet statistics."""

from PIL import Image


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """The centre ``image_size`` x ``image_size`` square of the image, resized by its shorter side.

    The image is halved with a box filter while its shorter side is at least twice ``image_size``, then resized
    bicubically.

    Raises:
        ValueError: the image is so narrow that the resized one would pass Pillow's limit on pixels.
    """
    while min(pil_image.size) >= 2 * image_size:
        half = pil_image.width // 2, pil_image.height // 2
        pil_image = pil_image.resize(half, resample=Image.Resampling.BOX)
    scale = image_size / min(pil_image.size)
    width, height = (round(side * scale) for side in pil_image.size)
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{pil_image.size[0]}x{pil_image.size[1]} pixels are too narrow for {image_size}"
        )
    pil_image = pil_image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return pil_image.crop((left, top, left + image_size, top + image_size))
