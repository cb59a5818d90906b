"""What overflows: every command stops with one line that names stage and remedy, and reports nothing as complete."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.measures import compare
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import load, scalars
from tests.scripts.conftest import BASE
from tests.scripts.test_main_vae import SMALL_VAE
from util.errors import NotFinite

STAGES = {
    "the tokenizer's encoder": "encoder.conv_in.weight",
    "the tokenizer's decoder": "decoder.conv_in.weight",
}
TRANSFORMER = "decoder_embed.weight"


def scale(path: Path, name: str) -> None:
    """Makes a file's weights so large that fp16 overflows; the norm behind them takes that out again."""
    content = torch.load(path, weights_only=True)
    for part in ("model", "model_ema"):
        if part in content:
            content[part][name] = content[part][name] * 1e7
    torch.save(content, path)


@pytest.fixture
def overflow(vae_path, tmp_path):
    """``overflow(stage)`` lets a stage of the small model overflow in fp16."""

    def overflow(stage: str) -> None:
        if stage in STAGES:
            scale(vae_path, STAGES[stage])
        else:
            scale(tmp_path / "weights" / "checkpoint-last.pth", TRANSFORMER)

    return overflow


# --------------------------------------------------------------------------------------------------------------------
# Sampling.


@pytest.mark.parametrize("how", ["", "--temperature 0", "--order confidence"])
@pytest.mark.parametrize(
    "stage, remedy",
    [("the transformer", "--precision fp32"), ("the tokenizer's decoder", "--vae_precision fp32")],
)
def test_an_evaluation_stops_at_what_overflows(
    run, refused, weights, overflow, tmp_path, stage, remedy, how
):
    overflow(stage)
    common = f"{weights} --evaluate --no_metrics --num_images 4 --num_iter 2 --output_dir {tmp_path}/out {how}"
    line = refused("main_tokenbridge", f"{common} --precision fp16")
    assert f"{stage} computed NaN or infinity in fp16: pass {remedy}" in line
    assert not list((tmp_path / "out").rglob("*.png"))
    run("main_tokenbridge", f"{common} --precision fp16 {remedy}")
    assert (tmp_path / "out" / "samples.png").exists()


def test_all_processes_end_after_the_chunk_in_which_one_overflows(
    run_two, weights, tmp_path, monkeypatch, capfd
):
    decode, chunks = AutoencoderKL.decode, tmp_path / "chunks"
    chunks.mkdir()

    def decoded(vae, z):
        (chunks / str(len(list(chunks.iterdir())))).touch()
        return decode(vae, z) * (torch.nan if torch.distributed.get_rank() else 1)

    monkeypatch.setattr(AutoencoderKL, "decode", decoded)
    common = f"{weights} --evaluate --no_metrics --num_images 40 --eval_bsz 4 --num_iter 2 --precision fp32"
    run_two("main_tokenbridge", f"{common} --output_dir {tmp_path}/out", status=2)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert (
        len(lines) == 1
        and lines[0].startswith("error: the tokenizer's decoder")
        and "1 of 2 ranks" in lines[0]
    )
    assert (
        len(list(chunks.iterdir())) <= 2
        and len(list((tmp_path / "out" / "samples").iterdir())) == 4
    )


@pytest.mark.parametrize("stage", ["the transformer", "the tokenizer's decoder"])
@pytest.mark.parametrize("script", ["generate", "tools.figures samples"])
def test_pictures_are_not_written_of_what_overflows(
    refused, weights, overflow, vae_path, tmp_path, script, stage
):
    overflow(stage)
    script, *figure = script.split()
    how = f"--resume {tmp_path}/weights --vae_path {vae_path} --classes 0 --num_iter 2 --precision fp16 --device cpu"
    line = refused(script, f"{' '.join(figure)} {how} --output {tmp_path}/out.png")
    assert f"{stage} computed NaN or infinity in fp16: pass --precision fp32 or bf16" in line
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("stage", ["the transformer", "the tokenizer's decoder"])
def test_training_goes_on_where_its_evaluation_overflows(
    train, vae_path, tmp_path, monkeypatch, caplog, stage
):
    train("run", "--epochs 1")
    sample, decode = TokenBridge.sample_tokens, AutoencoderKL.decode
    if stage == "the transformer":  # its levels are finite whatever its logits are

        def sample_tokens(*args, **options):
            latents, confidence = sample(*args, **options)
            return latents, confidence * torch.nan

        monkeypatch.setattr(TokenBridge, "sample_tokens", sample_tokens)
    else:
        monkeypatch.setattr(AutoencoderKL, "decode", lambda *args: decode(*args) * torch.nan)
    online = f"--online_eval --no_metrics --num_images 4 --num_iter 2 --eval_freq 1 --vae_path {vae_path}"
    folder = train("run", f"--epochs 3 --resume {tmp_path}/run {online}")
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    # Also of the epoch that the resumed run found unmeasured.
    assert len(warnings) == 3 and all(text.endswith("Training continues") for text in warnings)
    for epoch, text in enumerate(warnings):
        assert text.startswith(f"NOT MEASURED after epoch {epoch}: {stage} computed NaN")
    assert load(folder)["epoch"] == 2 and not list((folder / "online_eval").glob("*.png"))


# --------------------------------------------------------------------------------------------------------------------
# Likelihood, caches, calibration, reconstruction.


@pytest.mark.parametrize("stage", ["the transformer's likelihood", "the tokenizer's encoder"])
def test_no_likelihood_is_written_that_is_not_finite(
    refused, weights, overflow, images, tmp_path, monkeypatch, stage
):
    shutil.copytree(images / "train", images / "val")
    if stage == "the tokenizer's encoder":  # which computes in fp32 here
        monkeypatch.setattr(AutoencoderKL, "encode", scaled(AutoencoderKL.encode, torch.inf))
    else:
        overflow(stage)
    common = f"{weights} --evaluate_nll --data_path {images} --output_dir {tmp_path}/out --precision fp16"
    assert f"{stage} computed NaN or infinity in fp" in refused("main_tokenbridge", common)
    assert not (tmp_path / "out").exists()


def scaled(encode, factor: float):
    """``encode``, of an image that is ``factor`` times as bright."""
    return lambda vae, x: encode(vae, x * factor)


def test_moments_that_are_not_finite_are_not_cached(
    run, refused, vae_path, overflow, images, tmp_path
):
    stage = "the tokenizer's encoder"
    overflow(stage)
    common = (
        f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0 --device cpu"
    )
    line = refused("main_cache", f"{common} --cached_path {tmp_path}/cache --precision fp16")
    assert f"{stage} computed NaN or infinity in fp16: pass --precision fp32 or bf16" in line
    assert not list((tmp_path / "cache").rglob("*.npz"))
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["complete"] is False
    calibrated = f"{BASE} --data_path {images} --vae_path {vae_path} --output_dir {tmp_path}/run --quant_calibrate"
    assert f"{stage} computed NaN" in refused("main_tokenbridge", f"{calibrated} --precision fp16")
    assert not (tmp_path / "run").exists()
    run("main_cache", f"{common} --cached_path {tmp_path}/cache --precision fp32")  # the remedy


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("flags", ["", "--sweep", "--quant_calibrate"])
def test_no_reconstruction_is_measured_that_is_not_finite(
    refused, vae_path, overflow, images, tmp_path, stage, flags
):
    overflow(stage)
    common = f"--img_size 16 --vae_path {vae_path} --image_dir {images} --num_workers 0 --device cpu --no_metrics"
    line = refused(
        "reconstruction", f"{common} --output_dir {tmp_path}/out --precision fp16 {flags}"
    )
    assert f"{stage} computed NaN or infinity in fp16: pass --precision fp32 or bf16" in line
    assert not list((tmp_path / "out").rglob("table1*")) and not list(
        (tmp_path / "out").rglob("reconstruction.png")
    )
    assert not any(
        "psnr_db" in json.loads(path.read_text())
        for path in (tmp_path / "out").rglob("results.json")
    )


@pytest.mark.parametrize(
    "stage, method", [("the tokenizer's encoder", "encode"), ("the tokenizer's decoder", "decode")]
)
def test_a_tokenizer_that_is_not_finite_is_trained_on_but_not_exported(
    refused, images, tmp_path, monkeypatch, caplog, stage, method
):
    original = getattr(AutoencoderKL, method)

    def measured(vae, x):  # not what is trained, nor the other stage
        return original(vae, x if torch.is_grad_enabled() else x * torch.nan)

    monkeypatch.setattr(AutoencoderKL, method, measured)
    out = tmp_path / "vae"
    line = refused(
        "main_vae", f"{SMALL_VAE} --data_path {images} --batch_size 8 --epochs 2 --output_dir {out}"
    )
    assert f"{stage} computed NaN" in line
    assert sum(f"NOT MEASURED after epoch {epoch}: {stage}" in caplog.text for epoch in (0, 1)) == 2
    assert (
        load(out, "vae-last.pth")["epoch"] == 1
        and not (out / "vae.ckpt").exists()
        and not (out / "vae.json").exists()
    )
    with pytest.raises(KeyError):
        scalars(out / "tokenizer_log", "tokenizer/psnr")


def test_features_that_are_not_finite_are_not_compared():
    made, real = torch.randn(17, 3).double(), torch.randn(13, 3).double()
    made[4, 1] = np.nan
    with pytest.raises(NotFinite, match="the network of --features"):
        compare(made, real)
