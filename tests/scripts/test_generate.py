"""demo/generate.py as a user types it: pictures, GIFs, editing, what is refused."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from models.pipeline import TokenBridgePipeline
from tests.scripts.conftest import pixels
from util.data.images import LINE, read_settings
from util.errors import UserError


@pytest.fixture
def generate(run, weights, vae_path, tmp_path):
    """``generate("--flag value")`` with the tiny model; the picture, ``tmp_path/out.png``."""

    def generate(flags: str) -> np.ndarray:
        model = f"--resume {tmp_path}/weights --vae_path {vae_path} --device cpu --precision fp32 --num_iter 4"
        run("generate", f"{model} --output {tmp_path}/out.png {flags}")
        return pixels(tmp_path / "out.png")

    return generate


def test_pictures_of_classes_are_those_of_an_evaluation(run, weights, generate, tmp_path):
    sampling = "--num_iter 4 --cfg 2.0 --temperature 0.9 --gen_seed 3 --precision bf16"
    common = (
        f"{weights} --evaluate --no_metrics --num_images 4 --output_dir {tmp_path}/out --eval_bsz 1"
    )
    run("main_tokenbridge", f"{common} {sampling}")
    generate(f"--classes 2 --seed 2 {sampling}")
    sample = pixels(tmp_path / "out" / "samples" / "00002.png")
    assert np.array_equal(pixels(tmp_path / "out.png"), sample)
    row = generate(f"--classes 2 0 --seed 2 --batch_size 1 {sampling}")
    assert row.shape == (16 + LINE, 32, 3) and np.array_equal(row[:16, :16], sample)


def test_a_picture_holds_what_makes_it_again(generate, weights, vae_path, tmp_path):
    made = generate("--classes 2 0 --seed 2 --candidates 2 --cfg 2.0 --order raster --gen_seed 3")
    settings = read_settings(tmp_path / "out.png")
    assert settings["class_labels"] == [2, 2, 0, 0] and sorted(settings["seeds"]) == [2, 2, 3, 3]
    pipe = TokenBridgePipeline.from_pretrained(tmp_path / "weights", vae_path, precision="fp32")
    for place, again in enumerate(pipe(**settings).images):
        top, left = (16 + LINE) * (place // 2), 16 * (place % 2)
        shown = made[top : top + 16, left : left + 16]
        assert np.abs(np.asarray(again).astype(int) - shown).max() <= 1
    Image.open(tmp_path / "out.png").save(
        tmp_path / "saved.png"
    )  # by a program that drops what it does not know
    for name in ("saved.png", "weights/checkpoint-last.pth", "nowhere.png"):
        with pytest.raises(UserError, match="holds no settings: choose a PNG"):
            read_settings(tmp_path / name)


def test_candidates_are_ranked_and_a_gif_fills_in(generate, tmp_path, caplog):
    caplog.set_level("INFO")
    sheet = generate("--classes 0 3 --candidates 3 --seed 5 --gif")
    assert sheet.shape == (2 * (16 + LINE), 48, 3)
    lines = [line.split() for line in caplog.messages if "log-likelihood" in line]
    assert [line[0] for line in lines] == ["0,"] * 3 + ["3,"] * 3
    scores = [float(line[-2]) for line in lines]
    assert scores[:3] == sorted(scores[:3], reverse=True) and scores[3:] == sorted(
        scores[3:], reverse=True
    )
    for place, line in enumerate(lines):
        top, left = (16 + LINE) * (place // 3), 16 * (place % 3)
        alone = generate(f"--classes {line[0][:-1]} --seed {line[2][:-1]}").astype(int)
        assert np.abs(alone - sheet[top : top + 16, left : left + 16]).max() <= 1
    assert sorted(lines[place][2] for place in range(3)) == ["5:", "6:", "7:"]
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (48, 2 * (16 + LINE))
        grey = []
        for frame in range(4):
            gif.seek(frame)
            near = np.abs(np.asarray(gif.convert("RGB"), dtype=int) - 128).max(axis=2) <= 2
            grey.append(near.mean())
        assert grey[0] > grey[1] > grey[2] > grey[3] and gif.info["duration"] > 2000


def test_every_picture_goes_into_a_file_of_its_own(run, generate, weights, vae_path, tmp_path):
    model = f"--resume {tmp_path}/weights --vae_path {vae_path} --device cpu --precision fp32"
    flags = f"--num_iter 4 --classes 2 0 --candidates 2 --gif --output_dir {tmp_path}/all/of/them"
    run("generate", f"{model} {flags}")
    files = sorted(path.name for path in (tmp_path / "all/of/them").iterdir())
    names = [f"class-{label}-seed-{seed}" for label in (0, 2) for seed in (0, 1)]
    assert files == sorted(f"{name}.{kind}" for name in names for kind in ("gif", "png"))
    alone = generate("--classes 2 --seed 1").astype(int)
    path = tmp_path / "all/of/them/class-2-seed-1.png"
    assert np.abs(alone - pixels(path)).max() <= 1
    assert read_settings(path)["class_labels"] == [2] and read_settings(path)["seeds"] == [1]


def test_pictures_are_edited(generate, tmp_path):
    image, mask = (
        np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8),
        np.zeros((16, 16), np.uint8),
    )
    mask[8:] = 255
    Image.fromarray(image).save(tmp_path / "in.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    edit = f"--image {tmp_path}/in.png --mask {tmp_path}/mask.png --seed 1"
    made = generate(f"{edit} --classes 1")
    assert np.array_equal(made[:8], image[:8]) and (made[8:] != image[8:]).mean() > 0.9
    assert not np.array_equal(made, generate(f"{edit} --classes 2"))
    assert not np.array_equal(made, generate(edit))
    image[8:] = 7
    Image.fromarray(image).save(tmp_path / "in.png")
    assert np.array_equal(made, generate(f"{edit} --classes 1"))
    around = generate(f"--image {tmp_path}/in.png --outpaint 4 --classes 1")
    assert np.array_equal(
        around[4:12, 4:12], np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BOX))
    )
    varied = [generate(f"--image {tmp_path}/in.png --strength {share}") for share in (0.2, 0.8)]
    assert not np.array_equal(*varied)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(path) -> None:
    """Writes a PNG of few bytes that says it has 2.5 billion pixels."""
    header = chunk(b"IHDR", struct.pack(">2I5B", 50_000, 50_000, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""))


def test_what_cannot_be_made_is_told_in_one_line(refused, weights, vae_path, tmp_path):
    model = f"--resume {tmp_path}/weights --vae_path {vae_path} --device cpu --output {tmp_path}/out.png"
    bomb(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (20, 20)).save(tmp_path / "in.png")
    other = torch.load(vae_path, weights_only=True)
    other["config"]["latent_factor"] = 0.25
    torch.save(other, tmp_path / "other.ckpt")
    image = f"--image {tmp_path}/in.png"
    for flags, says in {
        "--classes 1 9": "no class '9': there are 4, numbered from 0",
        "--seed -1": "--seed -1: it must lie between 0 and",
        "--seed 4294967296": "--seed 4294967296: it must lie between",
        "--num_iter 0": "--num_iter 0: it must be above zero",
        "--cfg nan": "--cfg nan",
        f"--image {tmp_path}/bomb.png": "decompression bomb",
        f"--image {tmp_path}/text.png": "text.png (it is no image); replace or remove it",
        f"{image} --mask {tmp_path}/in.png": "the mask covers nothing",
        f"{image} --mask {tmp_path}/in.png --outpaint 2": "--mask and --outpaint exclude each other",
        f"{image} --outpaint 8": "the margin of 8 pixels does not fit an image of 16 pixels: choose 1 to 7",
        "--outpaint 2": "--mask and --outpaint need --image",
        f"{image} --strength 2": "strength 2.0: it must be above 0",
        f"--vae_path {tmp_path}/other.ckpt": "was trained with another tokenizer",
        "--output out.png --output_dir out": "--output and --output_dir exclude each other",
        "--strength 0.5": "strength is for variations",
        "--output out.jpg": "--output out.jpg: choose a name that ends in .png",
        "--resume nowhere": "there is no file or folder nowhere",
    }.items():
        assert says in refused("generate", f"{model} {flags}"), flags
    assert "has no tokenizer beside it (vae or vae.ckpt): pass one (--vae_path, or" in refused(
        "generate", f"--resume {tmp_path}/weights --device cpu"
    )
    assert "--resume is missing" in refused("generate", "--classes 1")
    assert not (tmp_path / "out.png").exists()
