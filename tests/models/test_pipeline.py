"""Pictures from Python: those of an evaluation, parts made anew, what is refused."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from models.editing import grown, insert_generated, kept_tokens, outpainted, prepare_edit
from models.pipeline import TokenBridgePipeline
from models.tokenbridge import TokenBridge
from models.tokenizer import Tokenizer
from models.vae import AutoencoderKL
from tests.conftest import OWN, TINY, filled, tiny_pipeline
from util.crop import center_crop_arr
from util.errors import UserError


@pytest.fixture
def pipe() -> TokenBridgePipeline:
    """A tiny model of 16 tokens, 4 pixels wide, and its tokenizer."""
    return tiny_pipeline()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    return Image.fromarray(
        np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    )


def box(width: int, height: int, *covered: int) -> Image.Image:
    """A mask of a rectangle: left, top, right, bottom."""
    mask = Image.new("L", (width, height))
    mask.paste(255, covered)
    return mask


def png(image: Image.Image) -> bytes:
    """What an evaluation writes of a picture."""
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    """Whether pictures are equal."""
    return len(a) == len(b) and all(map(np.array_equal, map(np.asarray, a), map(np.asarray, b)))


def to_bytes(image: Image.Image) -> torch.Tensor:
    """A picture as bytes ``[3, H, W]``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def most_differ(a: list[Image.Image], b: list[Image.Image]) -> int:
    """The largest difference of a byte."""
    pairs = zip(a, b, strict=True)
    return max(np.abs(np.asarray(x, dtype=int) - np.asarray(y, dtype=int)).max() for x, y in pairs)


# --------------------------------------------------------------------------------------------------------------------
# Pictures of classes.


@pytest.mark.parametrize(
    "how, gen_seed, ema",
    [
        ({"num_iter": 5, "cfg": 2.0, "temperature": 0.9}, 0, None),
        (
            {
                "num_iter": 3,
                "cfg": 2,
                "cfg_schedule": "constant",
                "order": "confidence",
                "confidence_noise": 0.5,
            },
            7,
            False,
        ),
        ({"num_iter": 256, "order": "raster", "first_place": "released"}, 0, None),
    ],
    ids=["random", "confidence", "raster"],
)
def test_pictures_are_those_of_an_evaluation(run, weights, vae_path, tmp_path, how, gen_seed, ema):
    flags = " ".join(f"--{name} {value}" for name, value in how.items()) + (
        " --no_ema" if ema is False else ""
    )
    common = f"{weights} --evaluate --no_metrics --num_images 8 --gen_seed {gen_seed} --output_dir {tmp_path}/out"
    run("main_tokenbridge", f"{common} {flags}")
    shutil.copy(vae_path, tmp_path / "weights" / "vae.ckpt")  # named by its place alone
    pipe = TokenBridgePipeline.from_pretrained(tmp_path / "weights", ema=ema)
    calls = []
    how["gen_seed"] = gen_seed
    made = pipe(
        [n // 2 for n in range(8)], seeds=range(8), callback=lambda *call: calls.append(call), **how
    )
    for number, image in enumerate(made.images):
        assert png(image) == (tmp_path / "out" / "samples" / f"{number:05d}.png").read_bytes()
    steps = min(how["num_iter"], 16)
    assert [call[:2] for call in calls] == [(step, steps) for step in range(1, steps + 1)]
    assert same(calls[-1][2], made.images)
    # Grey tokens become fewer with each step, and only they change.
    before = np.full((8, 4, 4), True)
    for _, _, pictures in calls:
        cells = np.stack([np.asarray(picture) for picture in pictures]).reshape(8, 4, 4, 4, 4, 3)
        grey = (cells == 128).all(axis=(2, 4, 5))
        assert (grey <= before).all() and (grey.sum(axis=(1, 2)) < before.sum(axis=(1, 2))).all()
        before = grey


def test_a_picture_depends_on_its_class_and_seed_alone(pipe, monkeypatch):
    common = {"num_iter": 4, "cfg": 2.0}
    eight = pipe([0, 1, 2, 3] * 2, seeds=range(8), **common)
    alone = [pipe(n % 4, seeds=n, batch_size=1, **common).images[0] for n in range(8)]
    assert most_differ(eight.images, alone) <= 1
    by_name = pipe(["bee", "CAT", "1"], seeds=[5, 6, 5], **common)
    assert same(by_name.images, pipe([1, 2, 1], seeds=(5, 6, 5), **common).images)
    assert pipe(["cat"], seeds=np.array([3, 4])).labels == [2, 2]
    assert pipe([0, 1, 2]).seeds == [0, 1, 2] and len(pipe(seeds=torch.arange(2)).images) == 2
    # Most likely first.
    scores = eight.log_likelihoods
    ranked = eight.ranked()
    assert ranked.log_likelihoods == sorted(scores, reverse=True) and len(set(scores)) == 8
    assert all(
        image is eight.images[seed] for seed, image in zip(ranked.seeds, ranked.images, strict=True)
    )
    # Where memory is not enough, in smaller batches.
    sample, sizes = TokenBridge.sample_tokens, []

    def sample_tokens(model, bsz, **options):
        sizes.append(bsz)
        if bsz > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(model, bsz, **options)

    monkeypatch.setattr(TokenBridge, "sample_tokens", sample_tokens)
    limit, calls = 3, []
    halved = pipe(
        [0, 1, 2, 3] * 2, seeds=range(8), callback=lambda *a: calls.append(a[:2]), **common
    )
    assert sizes == [8, 4, 2, 2, 4, 2, 2] and most_differ(halved.images, eight.images) <= 1
    assert calls[-1] == (16, 16) and [step for step, _ in calls] == list(range(1, 17))
    limit = 0
    with pytest.raises(UserError, match="too little memory for one image"):
        pipe(0)


def test_models_and_tokenizers_come_from_folders_files_and_the_hub(
    run, served, trained, vae_path, tmp_path
):
    own = AutoencoderKL.from_pretrained(vae_path)
    expected = TokenBridgePipeline.from_pretrained(trained, vae_path)("class2", num_iter=3).images
    model = TokenBridge.from_pretrained(trained)
    model.save_pretrained(tmp_path / "exported")
    own[0].save_pretrained(tmp_path / "exported" / "vae", own[1])
    files = [
        f"{folder}{name}"
        for folder in ("", "vae/")
        for name in ("model.safetensors", "config.json")
    ]
    served.add(OWN, {name: tmp_path / "exported" / name for name in files})
    served.add(
        OWN, {"run/checkpoint-last.pth": trained / "checkpoint-last.pth", "run/vae.ckpt": vae_path}
    )
    for place in (tmp_path / "exported", f"hf://{OWN}", OWN, f"hf://{OWN}/run"):
        assert same(
            TokenBridgePipeline.from_pretrained(place)("class2", num_iter=3).images, expected
        ), place
    found = TokenBridgePipeline.from_pretrained(trained / "checkpoint-last.pth", f"hf://{OWN}/vae")
    assert same(found("class2", num_iter=3).images, expected)
    # What the run names.
    with pytest.raises(
        UserError,
        match=r"no tokenizer beside it \(vae or vae.ckpt\), and .*pretrained_models.*pass one",
    ):
        TokenBridgePipeline.from_pretrained(trained)
    data = f"--vae_path {vae_path} --data_path {tmp_path}/data --output_dir {tmp_path}/b"
    run("main_tokenbridge", f"{TINY} {data} --epochs 1")
    assert TokenBridgePipeline.from_pretrained(tmp_path / "b").tokenizer.latent_factor == 0.5


# --------------------------------------------------------------------------------------------------------------------
# Parts made anew.


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (33, 100), (16, 20)], ids=str)
def test_nothing_leaks_from_under_the_mask_and_the_rest_stays(pipe, size):
    width, height = size
    image, mask = noise(*size), box(*size, 0, height // 2, width // 3, height)
    other = image.copy()
    other.paste(noise(*size, seed=1), mask=mask)
    assert not same([image], [other])
    how = {"seeds": range(2), "mask_image": mask, "num_iter": 4, "cfg": 2.0}
    made, again = pipe("bee", image=image, **how), pipe("bee", image=other, **how)
    assert same(made.images, again.images) and torch.equal(made.confidence, again.confidence)
    # The mask holds every pixel of the crop that a pixel under it has a part in, and few beside them.
    edit = prepare_edit(image, mask, 16)
    filled_in = []
    for colour in (0, 255):
        image.paste((colour,) * 3, mask=mask)
        filled_in.append(np.asarray(center_crop_arr(image, 16)))
    touched = torch.from_numpy((filled_in[0] != filled_in[1]).any(axis=2))
    assert edit.mask[touched].all() and grown(touched[None])[0][edit.mask].all()
    assert size != (16, 16) or torch.equal(edit.mask, touched)
    for picture in made.images:
        changed = (to_bytes(picture) != edit.original).any(dim=0)
        assert not changed[~edit.mask].any() and changed[edit.mask].float().mean() > 0.9
    assert not same(made.images[:1], made.images[1:])  # by the seed
    assert not same(made.images, pipe("cat", image=image, **how).images)  # by the class


def test_tokens_near_the_mask_are_made_anew():
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, 0, 0] = mask[1, 8:, :] = True
    kept = kept_tokens(mask, 4).unflatten(1, (4, 4)).int().tolist()
    assert kept[0] == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert kept[1] == [[1] * 4, [0] * 4, [0] * 4, [0] * 4]


def test_seams_are_evened_out_within_the_mask():
    original, made = (torch.full((1, 3, 64, 64), value, dtype=torch.uint8) for value in (100, 140))
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 32:] = True
    column = insert_generated(made, original, mask)[0, 0, :, 5].int()
    assert (column[:32] == 100).all() and column[32] < 110 and (column[40:] == 140).all()
    assert (column.diff() >= 0).all()


def test_edited_pictures_fill_in_one_batch_after_another(pipe):
    image, masks = (
        noise(16, 16),
        [box(16, 16, 0, 0, 4, 4), box(16, 16, 0, 8, 16, 16), box(16, 16, 12, 12, 16, 16)],
    )
    calls = []
    made = pipe(
        1, image=image, mask_image=masks, num_iter=3, callback=lambda *call: calls.append(call)
    )
    assert [call[:2] for call in calls] == [(step, 6) for step in range(1, 7)] and same(
        calls[-1][2], made.images
    )
    alone = [
        pipe(1, seeds=n, image=image, mask_image=mask, num_iter=3).images[0]
        for n, mask in enumerate(masks)
    ]
    assert most_differ(made.images, alone) <= 1
    half_way = np.asarray(calls[-2][2][0])
    assert np.array_equal(half_way[4:], np.asarray(image)[4:])
    known = [(confidence == 0).sum().item() for confidence in made.confidence]
    assert known == [12, 4, 12]


def test_variations_keep_some_tokens(pipe):
    image = noise(20, 30)
    few, many = (
        pipe(1, seeds=range(4), image=image, strength=share, num_iter=4) for share in (0.25, 0.75)
    )
    assert (few.confidence != 0).sum(dim=(1, 2)).tolist() == [4] * 4
    assert (many.confidence != 0).sum(dim=(1, 2)).tolist() == [12] * 4
    assert len({png(picture) for picture in few.images}) == 4
    assert len({tuple((row != 0).flatten().tolist()) for row in few.confidence}) == 4
    assert same(few.images, pipe(1, seeds=range(4), image=image, strength=0.25, num_iter=4).images)


def test_a_canvas_for_outpainting(pipe, tmp_path):
    noise(30, 20).convert("P").save(tmp_path / "image.png")
    canvas, mask = outpainted(tmp_path / "image.png", 16, 3)
    assert canvas.size == mask.size == (16, 16) and np.asarray(mask)[3:13, 3:13].max() == 0
    assert np.asarray(mask, dtype=int).sum() == 255 * (256 - 100)
    (made,) = pipe(2, image=canvas, mask_image=mask, num_iter=2).images
    assert np.array_equal(np.asarray(made)[3:13, 3:13], np.asarray(canvas)[3:13, 3:13])
    assert (np.asarray(made)[:3] != np.asarray(canvas)[:3]).any()
    with pytest.raises(
        UserError, match="the margin of 8 pixels does not fit an image of 16 pixels: choose 1 to 7"
    ):
        outpainted(tmp_path / "image.png", 16, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_and_masks_of_any_mode(pipe, tmp_path, mode):
    image, mask = noise(24, 24), box(24, 24, 0, 0, 12, 24)
    if mode == "I;16":
        image, mask = (
            Image.fromarray(np.asarray(x.convert("L")).astype(np.uint16) * 257)
            for x in (image, mask)
        )
    else:
        image, mask = (
            image.convert(mode),
            mask.convert("RGB").convert(mode) if mode == "CMYK" else mask.convert(mode),
        )
    how = {"num_iter": 2, "seeds": 1}
    (made,) = pipe(0, image=image, mask_image=mask, **how).images
    for name, x in {"image.tif": image, "mask.tif": mask}.items():
        x.save(tmp_path / name)
    paths = {"image": tmp_path / "image.tif", "mask_image": str(tmp_path / "mask.tif")}
    assert same([made], pipe(0, **paths, **how).images)


def as_tensor(image: Image.Image) -> torch.Tensor:
    """A picture as bytes ``[3, H, W]``, or ``[H, W]``."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels


@pytest.mark.parametrize(
    "kind", ["tensor", "floats", "batch", "half", "array", "float array", "arrays", "list", "bool"]
)
def test_images_and_masks_may_be_tensors_and_arrays(pipe, kind):
    images, masks = (
        [noise(20, 24, seed) for seed in (0, 1)],
        [box(20, 24, 0, 0, 8 * n, 24) for n in (1, 2)],
    )
    expected = pipe(1, image=images, mask_image=masks, num_iter=2)
    bytes_, covered = ([as_tensor(picture) for picture in pictures] for pictures in (images, masks))
    arrays = [np.array(image) for image in images], [np.array(mask) for mask in masks]
    given = {
        "tensor": (bytes_, covered),
        "floats": ([x / 255 for x in bytes_], [x[None] / 255 for x in covered]),
        "half": (
            (torch.stack(bytes_) / 255).half(),
            (torch.stack(covered)[:, None] / 255).bfloat16(),
        ),
        "batch": (torch.stack(bytes_), torch.stack(covered)[:, None]),
        "array": arrays,
        "float array": ([x / 255 for x in arrays[0]], [x[..., None] / 255 for x in arrays[1]]),
        "arrays": (np.stack(arrays[0]), np.stack(arrays[1])[..., None]),
        "list": ([torch.stack(bytes_)[:1], arrays[0][1]], [masks[0], covered[1]]),
        "bool": (images, np.stack(arrays[1])[..., None] > 0),
    }[kind]
    assert same(pipe(1, image=given[0], mask_image=given[1], num_iter=2).images, expected.images)


def erased(image: Image.Image, *covered: int) -> Image.Image:
    """A picture of which a rectangle is transparent."""
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), covered)
    return image


def strokes(color: tuple[int, ...], background: tuple[int, ...]) -> Image.Image:
    """A rectangle of one color, as one draws it on a layer."""
    layer = Image.new("RGBA", (16, 16), background)
    layer.paste(color, (0, 0, 8, 16))
    return layer


def test_what_is_erased_from_a_photograph_is_made_anew(pipe, tmp_path):
    bright = (
        noise(3, 3).resize((16, 16), Image.Resampling.BICUBIC).point(lambda value: 100 + value // 2)
    )
    white = Image.new("RGB", (16, 16), "white")
    white.putpixel((12, 4), (0, 0, 0))
    expected = prepare_edit(bright, box(16, 16, 0, 0, 8, 16), 16)
    mask = erased(bright, 0, 0, 8, 16)
    mask.save(tmp_path / "mask.png")
    mask.save(tmp_path / "mask.webp")  # lossy
    for given in (mask, tmp_path / "mask.png", tmp_path / "mask.webp"):
        assert torch.equal(prepare_edit(bright, given, 16).mask, expected.mask)
    black = strokes((0, 0, 0, 0), (0, 0, 0, 255))  # what is left is black: both readings agree
    for image, given in ((mask, mask), (bright, black), (white, erased(white, 0, 0, 8, 16))):
        edit = prepare_edit(image, given, 16)
        assert torch.equal(edit.mask, expected.mask) and not edit.seen[:, edit.mask].any()
    # Transparency that does not vary says nothing.
    plain = box(16, 16, 0, 0, 8, 16)
    for alpha in (255, 120, 0):
        layer = plain.convert("RGBA")
        layer.putalpha(alpha)
        assert torch.equal(prepare_edit(bright, layer, 16).mask, expected.mask)


@pytest.mark.parametrize(
    "image", [noise(16, 16), Image.new("RGB", (16, 16), "white")], ids=["noise", "white"]
)
@pytest.mark.parametrize(
    "mask",
    [
        strokes((255, 255, 255, 255), (0, 0, 0, 0)),
        strokes((255, 255, 0, 255), (255, 255, 255, 0)),
        strokes((255, 255, 255, 0), (255, 255, 255, 255)),
        erased(box(16, 16, 0, 0, 8, 16), 0, 0, 16, 3),
    ],
    ids=["white strokes", "yellow strokes", "a hole in white", "black and white, and a hole"],
)
def test_masks_of_two_readings_are_refused(mask, image):
    with pytest.raises(
        UserError, match=r"the mask is ambiguous: its brightness selects .* its transparency"
    ) as error:
        prepare_edit(image, mask, 16)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------------
# Refused.


@pytest.mark.parametrize(
    "given, says",
    [
        ({"class_labels": "bea"}, "no class 'bea': did you mean bee"),
        ({"class_labels": [0, 4]}, "no class 4: there are 4, numbered from 0"),
        ({"class_labels": -1}, "no class -1"),
        ({"class_labels": "7"}, "no class '7': there are 4"),
        ({"class_labels": [0, 1], "seeds": [1, 2, 3]}, "2 class_labels for 3 images"),
        ({"class_labels": []}, "0 class_labels for 1 images"),
        ({"seeds": -1}, "whole numbers from 0 to 4294967295"),
        ({"seeds": [0, 2**32]}, "whole numbers from 0"),
        ({"seeds": [0.5]}, "whole numbers from 0"),
        ({"gen_seed": -1}, "gen_seed not negative"),
        ({"batch_size": 0}, "batch_size 0: it must be above zero"),
        ({"num_iter": 0}, "at least one step"),
        ({"cfg": -1.0}, "must not be negative"),
        ({"cfg": float("nan")}, "cfg must be a finite number"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"order": "zigzag"}, "order is one of"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule is"),
        ({"first_place": "last"}, "first_place is one of"),
        ({"head_steps": 2}, "--head_steps only applies to --head masked"),
        ({"mask_image": box(16, 16, 0, 0, 4, 4)}, "a mask needs an image"),
        ({"image": noise(16, 16), "strength": 0.0}, "strength 0.0: it must be above 0"),
        ({"strength": 0.5}, "strength is for variations"),
        ({"image": noise(16, 16), "mask_image": box(16, 16, 0, 0, 4, 4), "strength": 0.5}, "strength is for variations"),
        ({"num_inference_steps": 4}, "no option num_inference_steps: pass num_iter"),
        ({"guidance_scale": 2.0}, "pass cfg"),
        ({"generator": torch.Generator()}, r"pass seeds, a number"),
        ({"seeds": torch.Generator()}, "seeds must be whole numbers"),
        ({"output_type": "np"}, "no option output_type: images are PIL images"),
        ({"confidence_noise": 1.0}, "confidence_noise only applies to"),
        ({"speed": 4}, "no option speed: did you mean seeds"),
        ({"frobnicate": 4}, "no option frobnicate: there are class_labels, seeds, .*num_iter, cfg, "),
        ({"cfg": "3"}, "cfg is a number, not of type str"),
        ({"num_iter": 2.5}, "num_iter is a whole number, not of type float"),
        ({"cfg_interval": 0.5}, r"cfg_interval takes 2 numbers, as in \(0.0, 1.0\)"),
        ({"class_labels": True}, "no class True"),
        ({"image": noise(16, 16), "mask_image": box(16, 16, 0, 0, 0, 0)}, "the mask covers nothing"),
        ({"image": noise(16, 16), "mask_image": box(16, 16, 0, 0, 16, 16)}, "the mask covers all"),
        ({"image": noise(60, 16), "mask_image": box(60, 16, 0, 0, 9, 16)}, "nothing of the cropped image"),
        ({"image": noise(16, 16), "mask_image": box(16, 15, 0, 0, 4, 4)}, "mask has 16x15 pixels, the image 16x16"),
        ({"image": noise(16, 16), "mask_image": [box(16, 16, 0, 0, 4, 4), None]}, "a mask for each image, or none"),
        ({"image": noise(16, 16), "mask_image": "midle"}, "no image midle, and no region .*: upper half"),
        ({"image": "nowhere.png"}, "no image at nowhere.png"),
        ({"image": [None, noise(16, 16)]}, "pass an image to edit for each generated image, or none"),
        ({"image": torch.zeros(16, 16, 3)}, r"image has the shape \[16, 16, 3\]: pass a tensor \[3, H, W\]"),
        ({"image": np.zeros((3, 16, 16))}, r"image has the shape \[3, 16, 16\]: pass .* an array \[H, W, 3\]"),
        ({"image": torch.zeros(0, 3, 16, 16)}, r"image has the shape \[0, 3, 16, 16\]"),
        ({"image": torch.full((3, 16, 16), 255.0)}, "image has values from 255 to 255: pass floats from 0"),
        ({"image": torch.linspace(-1, 1, 768).view(3, 16, 16)}, "image has values from -1 to 1: pass floats"),
        ({"image": np.full((16, 16, 3), np.nan)}, "image has values from nan to nan: pass floats"),
        ({"image": np.zeros((16, 16, 3), int)}, r"image has type int64: pass bytes \(uint8\)"),
        ({"image": {"a": 1}}, "image: pass PIL images, paths, tensors or arrays, not dict"),
        ({"image": noise(16, 16), "mask_image": np.zeros((16, 16, 3))}, r"mask_image has the shape \[16, 16, 3\]"),
        ({"class_labels": torch.zeros(2, 3)}, "no class of type list"),
        ({"class_labels": torch.rand(2)}, "no class 0"),
        ({"seeds": torch.zeros(2, 3)}, "seeds must be whole numbers"),
        ({"image": noise(16, 16), "strength": torch.tensor(2.0)}, "strength 2.0: it must be above 0"),
        ({"image": Image.new("1", (9000, 9000))}, "cannot read image the image .9000x9000 pixels, more than 67108864"),
        ({"image": Image.new("1", (1_000_000, 1))}, "cannot crop the image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_made_is_told(pipe, given, says):
    with pytest.raises(UserError, match=says) as error:
        pipe(**{"class_labels": 0, "num_iter": 2, **given})
    assert (
        "\n" not in str(error.value)
        and "tensor(" not in str(error.value)
        and "array(" not in str(error.value)
    )


def test_what_a_pipeline_cannot_be_made_of_is_told(pipe, trained, vae_path):
    load = TokenBridgePipeline.from_pretrained
    for says, make in {
        "no option torch_dtype: pass precision": lambda: load(trained, torch_dtype=torch.float16),
        "no option device: move the pipeline": lambda: load(trained, device="cpu"),
        "no option vae: pass tokenizer": lambda: load(trained, vae=vae_path),
        "tokenizer is a path here": lambda: load(trained, pipe.tokenizer),
        "no option emma: from_pretrained takes tokenizer, ema": lambda: load(trained, emma=True),
        "precision 'bf15': choose fp32, bf16, fp16": lambda: load(
            trained, vae_path, precision="bf15"
        ),
        "a Tokenizer, not of TokenBridge and AutoencoderKL": lambda: TokenBridgePipeline(
            pipe.model, pipe.tokenizer.vae
        ),
        "stay float32: for half": lambda: pipe.to(torch.float16),
        "stay float32: for half precision": lambda: pipe.to("cpu", torch.float16),
    }.items():
        with pytest.raises(UserError, match=says):
            make()


def test_a_saved_pipeline_generates_the_same_and_knows_its_tokenizer(pipe, tmp_path):
    plain = TokenBridge.from_config(pipe.model.config)
    plain.load_state_dict(pipe.model.state_dict())
    saved = TokenBridgePipeline(plain.eval(), pipe.tokenizer, "fp32")
    saved.save_pretrained(tmp_path / "saved")
    loaded = TokenBridgePipeline.from_pretrained(tmp_path / "saved", precision="fp32")
    made, again = (each([0, 1], num_iter=2, cfg=2.0) for each in (saved, loaded))
    assert [image.tobytes() for image in made.images] == [i.tobytes() for i in again.images]
    other = filled(AutoencoderKL(4, (1, 1, 2), ch=8, num_res_blocks=1))
    other.post_quant_conv.bias.data += 1
    other.save_pretrained(tmp_path / "other", pipe.tokenizer.latent_factor)
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        TokenBridgePipeline.from_pretrained(tmp_path / "saved", tmp_path / "other")


def test_a_named_region_is_a_mask_of_the_cropped_image(pipe):
    image = noise(32, 16)
    made = {
        mask: pipe(0, image=image, mask_image=given, num_iter=2).images[0].tobytes()
        for mask, given in {
            "named": "lower half",
            "drawn": box(32, 16, 0, 8, 32, 16),
            "middle": "middle",
        }.items()
    }
    assert made["named"] == made["drawn"] != made["middle"]


def test_an_image_of_which_no_token_is_kept_is_told(pipe, caplog):
    image = noise(16, 16)
    pipe(0, image=image, mask_image=box(16, 16, 0, 0, 2, 2), num_iter=2)
    assert "no influence" not in caplog.text
    pipe(0, image=image, mask_image=box(16, 16, 1, 1, 15, 15), num_iter=2)
    assert "the image has no influence" in caplog.text


def test_a_tokenizer_of_another_model_is_refused(pipe):
    for vae, factor in (
        (pipe.tokenizer.vae, 0.6),
        (filled(AutoencoderKL(4, (1, 1, 2), ch=8, num_res_blocks=1)), 0.5),
    ):
        with pytest.raises(
            UserError,
            match=r"was trained with another tokenizer: .* has \d latent channels, stride 4",
        ):
            TokenBridgePipeline(pipe.model, Tokenizer(vae, factor))


def test_a_tokenizer_of_other_weights_is_refused_by_name(trained, vae_path, tmp_path):
    content = torch.load(vae_path, weights_only=True)
    content["model"]["post_quant_conv.bias"] += 1
    torch.save(content, tmp_path / "other.ckpt")
    TokenBridgePipeline.from_pretrained(trained, vae_path)
    with pytest.raises(
        UserError,
        match=r"/run/.* was trained with another tokenizer than .*/other.ckpt: .*--vae_path",
    ):
        TokenBridgePipeline.from_pretrained(trained, tmp_path / "other.ckpt")
