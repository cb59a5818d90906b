"""What the scripts refuse: one line that says what to do, status 2, nothing left behind."""

import pytest

from tests.conftest import TINY

# --------------------------------------------------------------------------------------------------------------------
# Bad input: one line that says what to do, status 2, nothing left behind.


def test_missing_files_are_named(refused, images, vae_path, cached, trained, tmp_path):
    out = f"--output_dir {tmp_path}/new"
    cases = {
        f"{TINY} --use_cached --cached_path {tmp_path}/nowhere {out}": "no cache at",
        f"{TINY} --use_cached {out}": "--cached_path",
        f"{TINY} --data_path {tmp_path}/nowhere {out}": "no image folder at",
        f"{TINY} --data_path {images} --vae_path {tmp_path}/nowhere {out}": "no checkpoint at",
        f"{TINY} --evaluate --vae_path {vae_path} --num_images 4 {out}": "--evaluate needs --resume",
        f"{TINY} --evaluate --vae_path {vae_path} --num_images 4 --resume {tmp_path}/new {out}": "checkpoint-last.pth",
        f"{TINY} --use_cached --cached_path {cached} --resume {tmp_path}/elsewhere {out}": "checkpoint-last.pth",
    }
    for command, words in cases.items():
        assert words in refused("main_tokenbridge", command)
    assert not (tmp_path / "new").exists()
    assert "no image folder" in refused(
        "main_cache", f"--data_path {tmp_path}/no --vae_path {vae_path} --cached_path {tmp_path}/c"
    )
    assert "--cached_path" in refused("main_cache", f"--data_path {images} --vae_path {vae_path}")
    assert "no image folder" in refused(
        "reconstruction", f"--image_dir {tmp_path}/no --vae_path {vae_path}"
    )
    assert "no image folder" in refused(
        "main_vae", f"--data_path {tmp_path}/no --output_dir {tmp_path}/new"
    )
    assert not (tmp_path / "c").exists() and not (tmp_path / "new").exists()


def test_values_that_cannot_work_are_named(refused, images, vae_path, cached, trained, tmp_path):
    use = f"--use_cached --cached_path {cached} --output_dir {tmp_path}/new"
    evaluate = f"--evaluate --no_metrics --resume {trained} --vae_path {vae_path} --output_dir {tmp_path}/new --num_images 8"
    small = "--model tokenbridge_tiny --img_size 16 --buffer_size 4 --num_workers 0"
    cases = {
        f"{small} --class_num 5 {use}": "4 classes, but class_num is 5",
        f"{TINY} {use} --img_size 32": "--img_size",
        f"{TINY} {use} --quant_bits 10": "1 to 9 bits",
        f"{TINY} {use} --quant_bits -1": "1 to 9 bits",
        f"{TINY} {use} --quant_min 5": "empty",
        f"{TINY} {use} --batch_size 64": "do not fill one step",
        f"{TINY} {use} --batch_size 0": "above zero",
        f"{TINY} {use} --grad_clip -1": "between 0",
        f"{TINY} {use} --ema_rate 1.5": "between 0 and 1",
        f"{TINY} {use} --vae_embed_dim 4": "has 8",
        f"{TINY} {use} --precision fp32 --lr 1e30 --warmup_epochs 0 --grad_clip 0 --epochs 3": "not finite",
        f"{TINY} {evaluate.replace('--no_metrics', '')} --num_images 10": "cannot be shared evenly by 4 classes",
        f"{TINY} {evaluate} --temperature -1": "not negative",
        f"{TINY} {evaluate} --dry_run": "--dry_run is for training: remove it",
        f"{TINY} {evaluate} --skip_bad_images": "--skip_bad_images is for training",
        f"{TINY} {use.replace('--use_cached ', '')}": "--cached_path only applies with --use_cached",
        f"{TINY} --cached_val_path {cached} --online_nll": "--cached_val_path only applies with --use_cached",
        f"{TINY} {evaluate} --cfg 2 -1": "--cfg -1.0: it must be a number, and not negative",
        f"{TINY} {evaluate} --quant_bits 4": "quant_levels is 8 in the checkpoint, 16 in this run (--quant_bits)",
        f"{small} --quant_bits 3 --class_num 2 {evaluate}": "class_num is 4 in the checkpoint, 2 in this run",
        f"--model tokenbridge_base {TINY.split('tiny', 1)[1]} {evaluate}": "model is tokenbridge_tiny in the",
    }
    for command, words in cases.items():
        assert words in refused("main_tokenbridge", command), command
    assert (
        not (tmp_path / "new" / "checkpoint-last.pth").exists()
        and not (tmp_path / "new" / "samples").exists()
    )
    for bits in (0, 10, -2):
        line = refused(
            "reconstruction",
            f"--bits {bits} --image_dir {images} --vae_path {vae_path} --output_dir {tmp_path}/r",
        )
        assert "1 to 9 bits" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_and_caches_are_named(
    refused, images, vae_path, cached, tmp_path, workers
):
    tiny = TINY.replace("--num_workers 0", f"--num_workers {workers}")
    (images / "train" / "class3" / "2.png").write_bytes(b"no image")
    (cached / "class1" / "0.png.npz").write_bytes(b"no cache")
    out = f"--output_dir {tmp_path}/new"
    assert "class3/2.png" in refused(
        "main_tokenbridge", f"{tiny} --data_path {images} --vae_path {vae_path} {out}"
    )
    assert "class1/0.png.npz" in refused(
        "main_tokenbridge", f"{tiny} --use_cached --cached_path {cached} {out}"
    )
    assert not (tmp_path / "new" / "checkpoint-last.pth").exists()
    new = f"--img_size 16 --num_workers {workers} --vae_path {vae_path} --data_path {images} --cached_path {tmp_path}/c"
    assert "class3/2.png" in refused("main_cache", new)
    line = refused("main_tokenbridge", f"{tiny} --use_cached --cached_path {tmp_path}/c {out}")
    assert "class" in line or "incomplete" in line or "holds no cached moments" in line
