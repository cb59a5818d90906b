"""Crops, schedules, loaders, pictures, files, and error lines."""

import math
import os
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import ROOT, write_images
from util import checkpoint, loader, misc
from util import images as pictures
from util.config import check_stride
from util.crop import center_crop_arr
from util.errors import UserError, run
from util.files import written_whole
from util.lr_sched import adjust_learning_rate

# --------------------------------------------------------------------------------------------------------------------
# Crop.


@settings(deadline=None, max_examples=50)
@given(st.integers(8, 120), st.integers(8, 120), st.integers(1, 40))
def test_crops_have_the_size_asked_for(width, height, size):
    assert center_crop_arr(Image.new("RGB", (width, height)), size).size == (size, size)


def test_crops_halve_by_box_then_resize_bicubically_to_the_centre():
    pixels = np.random.RandomState(0).randint(0, 255, (90, 70, 3), dtype=np.uint8)
    # 70 is at least twice 16, and so is 35: halved to 17 x 22, then resized to 16 x 21, of which rows 2 to 17 are kept.
    expected = Image.fromarray(pixels).resize((35, 45), Image.Resampling.BOX).resize((17, 22), Image.Resampling.BOX)
    expected = np.array(expected.resize((16, 21), Image.Resampling.BICUBIC))[2:18]
    assert np.array_equal(np.array(center_crop_arr(Image.fromarray(pixels), 16)), expected)
    square = Image.fromarray(pixels[:16, :16])
    assert np.array_equal(np.array(center_crop_arr(square, 16)), pixels[:16, :16])


# --------------------------------------------------------------------------------------------------------------------
# Learning rate.


def test_learning_rate_warms_up_then_follows_the_schedule():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr_scale": 0.1}], lr=1.0)
    args = Namespace(lr=2.0, min_lr=0.5, warmup_epochs=10, epochs=110, lr_schedule="cosine")
    for epoch, expected in {0: 0, 2.5: 0.5, 10: 2.0, 60: 1.25, 110: 0.5}.items():
        assert adjust_learning_rate(optimizer, epoch, args) == pytest.approx(expected)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected, 0.1 * expected])
    assert adjust_learning_rate(optimizer, 35, args) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
    args.lr_schedule = "constant"
    assert adjust_learning_rate(optimizer, 100, args) == 2.0
    args.warmup_epochs = 0
    assert adjust_learning_rate(optimizer, 0, args) == 2.0


# --------------------------------------------------------------------------------------------------------------------
# Loaders.


def test_image_folder_with_filename(images):
    dataset = loader.ImageFolderWithFilename(images / "train", loader.image_transform(16))
    image, label, name = dataset[5]
    assert (label, name) == (1, "class1/1.png") and image.shape == (3, 16, 16)
    assert -1 <= image.min() < image.max() <= 1
    grey = dataset[0][0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_pixels_run_from_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 127, 255]]], dtype=np.uint8))
    assert torch.allclose(loader.to_pixels(image).flatten(), torch.tensor([-1.0, 127 / 127.5 - 1, 1.0]))
    every = torch.arange(256).float() / 127.5 - 1
    assert torch.equal(pictures.to_uint8(every), torch.arange(256, dtype=torch.uint8))
    assert pictures.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_mirrors_only_where_asked(images):
    plain = loader.ImageFolder(images / "train", loader.image_transform(16))
    mirrored = loader.ImageFolder(images / "train", loader.image_transform(16), mirror=True)
    image = plain[1][0]
    views = [mirrored[1][0] for _ in range(40)]
    same = sum(torch.equal(view, image) for view in views)
    assert all(torch.equal(view, image) or torch.equal(view, image.flip(2)) for view in views) and 8 < same < 32


def write_cache(root, count=3, **arrays):
    for number in range(count):
        path = root / "a" / f"{number}.JPEG.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = np.full((4, 2, 2), number, dtype=np.float32)
        np.savez(path, **{"moments": moments, "moments_flip": moments + 100, **arrays})
    return root


def test_cached_folder_picks_either_view(tmp_path):
    dataset = loader.CachedFolder(write_cache(tmp_path))
    assert len(dataset) == 3 and dataset.classes == ["a"] and dataset.metadata == {}
    values = [dataset[2][0].unique().item() for _ in range(60)]
    assert set(values) == {2, 102} and 15 < values.count(2) < 45
    assert dataset[2][0].dtype == torch.float32 and dataset[2][1] == 0
    never = loader.CachedFolder(tmp_path, mirror=False)
    assert {never[1][0].unique().item() for _ in range(30)} == {1}


def test_damaged_caches_are_named(tmp_path):
    dataset = loader.CachedFolder(write_cache(tmp_path, moments_flip=np.full((4, 2, 2), np.nan)))
    with pytest.raises(UserError, match=r"0\.JPEG\.npz \(moments_flip is not finite"):
        [dataset[0] for _ in range(40)]
    path = tmp_path / "a" / "1.JPEG.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"1\.JPEG\.npz"):
        dataset[1]
    np.savez(tmp_path / "a" / "2.JPEG.npz", other=np.zeros(1))
    with pytest.raises(UserError, match=r"2\.JPEG\.npz"):
        dataset[2]
    (tmp_path / "cache.json").write_text('{"images": 9}')
    with pytest.raises(UserError, match="incomplete: 3 of 9"):
        loader.CachedFolder(tmp_path)
    (tmp_path / "cache.json").write_text('{"images": 3, "complete": false}')
    with pytest.raises(UserError, match="incomplete: 3 of 3"):
        loader.CachedFolder(tmp_path)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"cache\.json is damaged"):
        loader.CachedFolder(tmp_path)


def test_missing_folders_and_unreadable_images_are_named(tmp_path):
    for make in (loader.ImageFolder, loader.CachedFolder):
        with pytest.raises(UserError, match="nowhere"):
            make(tmp_path / "nowhere")
        with pytest.raises(UserError, match=str(tmp_path)):
            make(tmp_path)
    data = write_images(tmp_path / "data")
    (data / "train" / "class2" / "bad.png").write_bytes(b"no image")
    dataset = loader.ImageFolder(data / "train")
    with pytest.raises(UserError, match=r"class2/bad\.png"):
        [dataset[i] for i in range(len(dataset))]
    with pytest.raises(UserError, match="4 class folders, but class_num is 5: pass --class_num 4"):
        loader.check_classes(dataset.classes, 5, data)


def test_coins_follow_seed_epoch_and_index_once_told(tmp_path):
    dataset = loader.CachedFolder(write_cache(tmp_path, count=40))

    def views(seed, epoch):
        dataset.set_draws(seed, epoch)
        return [dataset[i][0].unique().item() >= 100 for i in range(40)]

    assert views(1, 0) == views(1, 0) and 10 < sum(views(1, 0)) < 30
    assert views(1, 0) != views(1, 1) and views(1, 0) != views(2, 0)


def test_a_share_of_an_epoch_can_start_in_its_middle():
    shares = [loader.ShuffledRankSampler(range(20), 2, rank, shuffle=True, seed=3) for rank in range(2)]
    for share in shares:
        share.set_epoch(5)
    whole = [list(share) for share in shares]
    assert sorted(whole[0] + whole[1]) == list(range(20))
    shares[0].start = 4
    assert list(shares[0]) == whole[0][4:] and len(shares[0]) == 10


def test_shares_cover_everything_once():
    shares = [list(loader.RankSampler(11, rank, 3)) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(11)) and [
        len(loader.RankSampler(11, rank, 3)) for rank in range(3)
    ] == [4, 4, 3]


# --------------------------------------------------------------------------------------------------------------------
# Pictures, files, errors, numbers.


def test_psnr_is_the_textbook_figure():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[1] += 5
    assert pictures.psnr(a, b).tolist() == [math.inf, pytest.approx(20 * math.log10(255 / 5))]


def test_grids_hold_every_image_where_it_belongs(tmp_path):
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8) * 40
    pictures.save_grid(images, tmp_path / "grid.png", columns=3, titles=["a", "b", "c"], min_size=16)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 18 + 2, 2 * 18 + 2 + 16)
        pixels = np.array(grid)
    for number in range(6):
        top, left = 16 + 2 + 18 * (number // 3), 2 + 18 * (number % 3)
        assert (pixels[top : top + 16, left : left + 16] == 40 * number).all()


def test_files_are_whole_or_untouched(tmp_path):
    path = tmp_path / "new" / "file"
    with written_whole(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), written_whole(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]
    with pytest.raises(UserError, match="cannot write"), written_whole(path / "below a file") as file:
        pass


FULL_DISK = """
import resource, torch
from util import checkpoint, files
from util.errors import run
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # writing on fails, as on a full disk
def main():
    {write}
run(main)
"""


@pytest.mark.parametrize(
    "write",
    [
        'checkpoint.save("checkpoint-last.pth", {"model": torch.zeros(100_000)}, keep_last=2)',
        'files.write_json("checkpoint-last.pth", "x" * 200_000)',
    ],
)
def test_a_full_disk_is_an_error_that_keeps_the_old_file(tmp_path, write):
    checkpoint.save(tmp_path / "checkpoint-last.pth", {"model": torch.ones(3)})
    before = (tmp_path / "checkpoint-last.pth").read_bytes()
    command = [sys.executable, "-c", FULL_DISK.format(write=write)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: cannot write checkpoint-last.pth: File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-last.pth"]
    assert (tmp_path / "checkpoint-last.pth").read_bytes() == before


def test_user_errors_are_one_line_also_from_workers(capsys):
    def worker():
        raise UserError("Caught UserError in worker 0.\nTraceback:\n  x\nutil.errors.UserError: cannot read image x\n")

    for main, line in {worker: "cannot read image x", lambda: check_stride(10, 4): "multiple"}.items():
        with pytest.raises(SystemExit) as stop:
            run(main)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and line in error and error.count("\n") == 1 and error.startswith("error: ")


def test_every_part_of_a_seed_counts():
    draws = set()
    for seeds in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)):
        misc.seed_everything(*seeds)
        draws.add(torch.rand(()).item())
    assert len(draws) == 4
    misc.seed_everything(7)
    first = torch.rand(())
    torch.manual_seed(7)
    assert torch.rand(()) == first
