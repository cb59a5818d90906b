"""The figures and pictures of reconstruction.py against what they should be of what the tokenizer was asked."""

import json
import math
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import reconstruction
from models.quantizer import GaussianQuantizer
from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from tests.conftest import FID
from tests.scripts.conftest import FACTOR, Watched
from util.data.datasets import image_transform
from util.data.images import psnr, ssim
from util.data.sources import read_image


def pixels(path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.fixture
def posteriors(monkeypatch):
    """Posterior, noise and sample of every draw."""
    draws, sample = [], DiagonalGaussianDistribution.sample

    def noted(posterior, noise=None):
        draws.append((posterior, noise, sample(posterior, noise)))
        return draws[-1][-1]

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", noted)
    return draws


@pytest.fixture
def decoded(monkeypatch):
    """AutoencoderKL.decode, watched."""
    watched, decode = Watched(AutoencoderKL.decode), AutoencoderKL.decode
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda vae, z: decode(vae, watched.note(vae, z)["z"])
    )
    return watched


@pytest.fixture
def common(images, vae_path, tmp_path) -> str:
    """Flags of all runs: 12 images, the first three of each class, in batches of 5, 5 and 2."""
    return (
        f"--img_size 16 --vae_path {vae_path} --image_dir {images} --num_workers 0 --device cpu --images_per_class 3 "
        f"--batch_size 5 --no_metrics --output_dir {tmp_path}/out"
    )


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_figures_are_those_of_scaled_posterior_samples(
    run, common, posteriors, decoded, tmp_path, images
):
    run("reconstruction", f"{common} --bits 3 --range 0.8")
    folder = tmp_path / "out" / "quant_b3_r0.8_n3"
    latents = FACTOR * torch.cat([sample for _, _, sample in posteriors])
    assert latents.shape == (12, 8, 4, 4) and all(noise is not None for _, noise, _ in posteriors)
    spread = torch.cat(
        [(sample - posterior.mean) / posterior.std for posterior, _, sample in posteriors]
    )
    assert spread.std().item() == pytest.approx(1, abs=0.1)
    indices, quantized = GaussianQuantizer(8, -0.8, 0.8)(latents)
    # What is decoded of each batch: some continuous latents to show, then the quantized ones.
    expected = quantized / FACTOR
    given = [
        z
        for z in decoded.all("z")
        if torch.isclose(z[:, None], expected, atol=1e-5).flatten(2).all(2).any()
    ]
    assert torch.allclose(torch.cat(given), quantized / FACTOR, atol=1e-5)

    figures = results(folder)
    below, above = (latents < -0.8).sum().item(), (latents > 0.8).sum().item()
    assert min(below, above) > 5
    assert figures["out_of_range_share"] == pytest.approx(
        (below + above) / latents.numel(), rel=1e-6
    )
    assert figures["latent_mse"] == pytest.approx(
        (latents - quantized).square().mean().item(), rel=1e-4
    )
    counts = torch.stack(
        [torch.bincount(channel.flatten(), minlength=8) for channel in indices.transpose(0, 1)]
    )
    shares = (counts / counts.sum(dim=1, keepdim=True)).double()
    bits = -(shares * shares.clamp(min=1e-12).log2()).sum(dim=1)
    assert figures["entropy_bits"] == pytest.approx(bits.tolist(), abs=1e-6)
    assert figures["levels_used"] == (counts > 0).sum(dim=1).tolist() and figures["levels"] == 8
    real, recon = (
        torch.stack([pixels(path) for path in sorted((folder / part).iterdir())])
        for part in ("real", "recon")
    )
    assert figures["psnr_db"] == pytest.approx(psnr(real, recon).mean().item())
    assert figures["ssim"] == pytest.approx(ssim(real, recon).mean().item())
    assert (figures["images"], figures["bits"], figures["range"], figures["seed"]) == (
        12,
        3,
        0.8,
        0,
    )

    # The first of each class, in order, each under its number; shown are eight of them, evenly spaced.
    for number in range(12):
        path = images / "train" / f"class{number // 3}" / f"{number % 3}.png"
        expected = (image_transform(16)(read_image(str(path))) + 1) * 127.5
        assert (real[number].float() - expected).abs().max() <= 1, number
    sheet = pixels(folder / "reconstruction.png")
    vae = AutoencoderKL.from_pretrained(common.split()[3])[0]
    with torch.no_grad():
        continuous = ((vae.decode(latents / FACTOR) + 1) * 127.5).clamp(0, 255)
    for row, number in enumerate((0, 1, 3, 4, 6, 7, 9, 10)):
        for column, picture in enumerate((real[number], continuous[number], recon[number])):
            shown = sheet[:, 18 + 130 * row :, 2 + 130 * column :][:, 4:128:8, 4:128:8]
            assert (shown.float() - picture.float()).abs().max() <= 1, (row, column)


def test_continuous_latents_are_decoded_as_they_were_drawn(
    run, common, posteriors, decoded, tmp_path
):
    run("reconstruction", f"{common} --bits -1 --precision fp16")
    for (_, _, sample), call in zip(posteriors, decoded.calls, strict=True):
        assert (
            torch.allclose(call["z"], sample.float(), atol=1e-5)
            and call["autocast"] == torch.float16
        )
    noise = [noise for _, noise, _ in posteriors]
    # Every image's noise is its number's, another seed's another.
    first = results(tmp_path / "out" / "quant_b-1_r5.0_n3")
    posteriors.clear()
    run("reconstruction", f"{common} --bits -1 --seed 1")
    assert not any(
        torch.allclose(old, new, atol=0.1)
        for old, (_, new, _) in zip(noise, posteriors, strict=True)
    )
    assert results(tmp_path / "out" / "quant_b-1_r5.0_n3")["psnr_db"] != first["psnr_db"]


def test_calibration_is_of_the_posteriors_and_gives_each_channel_its_range(
    run, run_two, common, posteriors, tmp_path
):
    run("reconstruction", f"{common} --quant_calibrate --range 0.1")
    folder = tmp_path / "out" / "quant_b6_calibrated_n3"
    figures = results(folder)
    mean = torch.cat([posterior.mean for posterior, _, _ in posteriors]).double()
    std = torch.cat([posterior.std for posterior, _, _ in posteriors]).double()
    deviation = ((mean**2 + std**2).mean(dim=(0, 2, 3)) - mean.mean(dim=(0, 2, 3)) ** 2).sqrt()
    assert figures["channel_mean"] == pytest.approx(
        (FACTOR * mean.mean(dim=(0, 2, 3))).tolist(), abs=1e-5
    )
    assert figures["channel_std"] == pytest.approx((FACTOR * deviation).tolist(), rel=1e-4)
    assert (
        figures["out_of_range_share"] < 0.01
    )  # of three times the root of three deviations, not of 0.1
    run_two("reconstruction", f"{common} --quant_calibrate --output_dir {tmp_path}/two")
    two = results(tmp_path / "two" / folder.name)
    for name in (
        "channel_mean",
        "channel_std",
        "psnr_db",
        "ssim",
        "latent_mse",
        "images",
        "entropy_bits",
    ):
        assert two[name] == pytest.approx(figures[name], rel=1e-4, abs=1e-6), name
    for part in ("real", "recon"):
        for path in (folder / part).iterdir():
            other = tmp_path / "two" / folder.name / part / path.name
            assert (pixels(path).int() - pixels(other).int()).abs().max() <= 1
    posteriors.clear()
    run("reconstruction", f"{common} --quant_calibrate --quantizer linear")
    assert (
        results(tmp_path / "out" / "linear_b6_calibrated_n3")["latent_mse"] != figures["latent_mse"]
    )


def test_reconstructions_but_not_originals_are_rounded_down_as_the_releases(run, common, tmp_path):
    run("reconstruction", common)
    folder = tmp_path / "out" / "quant_b6_r5.0_n3"
    before = {path: pixels(path).int() for path in folder.glob("re*/*.png")}
    run("reconstruction", f"{common} --rounding down")
    for path, nearest in before.items():
        change = pixels(path).int() - nearest
        assert change.unique().tolist() == ([-1, 0] if path.parent.name == "recon" else [0]), path


def test_what_another_run_left_in_the_folder_goes_and_other_images_are_refused(
    run, refused, common, images, tmp_path
):
    folder = tmp_path / "out" / "quant_b6_r5.0_n3"
    with (
        mock.patch.object(AutoencoderKL, "decode", side_effect=RuntimeError("interrupted")),
        pytest.raises(RuntimeError),
    ):
        run("reconstruction", common)
    assert results(folder)["images"] == 12 and (folder / "real" / "00000.png").exists()
    shutil.rmtree(images / "train" / "class3")
    for name in ("mine.png", "real/mine.png"):
        (folder / name).write_bytes(b"mine")
    run("reconstruction", common)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    own = {f"{part}/{number:05d}.png" for part in ("real", "recon") for number in range(9)}
    assert there == {*own, "reconstruction.png", "mine.png", "real/mine.png"}
    (folder / "recon" / "00009.png").write_bytes(b"mine")
    assert "recon/00009.png was not made by this project" in refused("reconstruction", common)
    (folder / "results.json").unlink()
    assert "18 more files were not made by this project" in refused("reconstruction", common)
    assert (folder / "recon" / "00009.png").read_bytes() == b"mine"


def test_a_sweeps_rows_and_columns_are_each_settings_own(run, common, tmp_path):
    run("reconstruction", f"{common} --sweep")
    folder = tmp_path / "out" / "sweep_n3"
    rows = {
        (row["bits"], row["range"]): row
        for row in json.loads((folder / "table1.json").read_text())["rows"]
    }
    table = (folder / "table1.md").read_text().splitlines()
    pictures = {}
    for bits, bound in ((-1, 5.0), (6, 5.0), (3, 5.0), (6, 2.0)):
        run("reconstruction", f"{common} --bits {bits} --range {bound}")
        alone = results(tmp_path / "out" / f"quant_b{bits}_r{bound}_n3")
        for name in ("latent_mse", "psnr_db", "ssim", "out_of_range_share"):
            assert rows[bits, bound][name] == alone[name], (bits, bound, name)
        title = "continuous" if bits < 0 else f"{2**bits} levels, range {bound:g}"
        (line,) = [line for line in table if line.startswith(f"| {title} |")]
        assert f"{alone['psnr_db']:.4g}" in line
        pictures[bits, bound] = (
            tmp_path / "out" / f"quant_b{bits}_r{bound}_n3" / "recon" / "00001.png"
        )
    for name, column, setting in (
        ("figure5", 1, (-1, 5.0)),
        ("figure5", 2, (6, 5.0)),
        ("figure6", 4, (3, 5.0)),
    ):
        shown = pixels(folder / f"{name}.png")[:, 18 + 130 :, 2 + 130 * column :][
            :, 4:128:8, 4:128:8
        ]
        assert torch.equal(shown, pixels(pictures[setting])), (name, column)
    assert not math.isnan(rows[6, 2.0]["psnr_db"])


# --------------------------------------------------------------------------------------------------------------------
# With other quantizers, settings and metrics.


def test_reconstruction_writes_figures_and_pictures(run, images, vae_path, tmp_path):
    common = f"--img_size 16 --vae_path {vae_path} --output_dir {tmp_path}/rec --images_per_class 3 --num_workers 0"
    results = {}
    for bits in (-1, 3, 6):
        run("reconstruction", f"{common} --image_dir {images} --bits {bits} --batch_size 5")
        folder = tmp_path / "rec" / f"quant_b{bits}_r5.0_n3"
        results[bits] = json.loads((folder / "results.json").read_text())
        for part in ("real", "recon"):
            assert sorted(os.listdir(folder / part)) == [f"{i:05d}.png" for i in range(12)]
        with Image.open(folder / "reconstruction.png") as picture:
            views = 2 if bits < 0 else 3
            assert picture.size == (views * (128 + 2) + 2, 8 * (128 + 2) + 2 + 16)
    assert results[-1]["latent_mse"] == 0 and "levels" not in results[-1]
    assert 0 < results[6]["latent_mse"] < results[3]["latent_mse"]
    assert results[6]["levels"] == 64 and max(results[6]["levels_used"]) <= 64
    # Neither the batch size nor naming train/ itself changes an image.
    run("reconstruction", f"{common} --image_dir {images}/train --bits 6 --batch_size 16 --range 5")
    again = json.loads((tmp_path / "rec" / "quant_b6_r5.0_n3" / "results.json").read_text())
    assert again["psnr_db"] == pytest.approx(results[6]["psnr_db"], abs=1e-3)


def test_reconstruction_with_other_quantizers(run, refused, images, vae_path, tmp_path):
    common = (
        f"--img_size 16 --num_workers 0 --vae_path {vae_path} --image_dir {images} --no_metrics"
    )
    errors = {}
    for flags in ("", "--quantizer linear", "--quant_calibrate"):
        run("reconstruction", f"{common} --output_dir {tmp_path}/out {flags}")
    for path in (tmp_path / "out").glob("*/results.json"):
        errors[path.parent.name] = json.loads(path.read_text())["latent_mse"]
    assert set(errors) == {"quant_b6_r5.0_n50", "linear_b6_r5.0_n50", "quant_b6_calibrated_n50"}
    # The small tokenizer's channels deviate little: levels that know it lie closer.
    assert errors["quant_b6_calibrated_n50"] < errors["quant_b6_r5.0_n50"]
    assert "--sweep is Table 1" in refused("reconstruction", f"{common} --sweep --quantizer linear")


def test_reconstruction_measures_against_statistics_and_originals(
    run, images, vae_path, quick_inception, fid_stats, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "util.metrics.compute.fid_statistics_to_metric",
        lambda a, b, **_: {FID: abs(a["mu"] - b["mu"]).sum()},
    )
    run(
        "reconstruction",
        f"--img_size 16 --vae_path {vae_path} --image_dir {images} --bits 4 --images_per_class 3 --num_workers 0 "
        f"--output_dir {tmp_path}/out {quick_inception.flag} --fid_stats {fid_stats[0]} --device cpu",
    )
    folder = tmp_path / "out" / "quant_b4_r5.0_n3"
    results = json.loads((folder / "results.json").read_text())
    assert (
        results["frechet_inception_distance"] != results["frechet_inception_distance_to_originals"]
    )
    expected = {}
    for name, part in {
        "frechet_inception_distance_to_originals": "real",
        "statistics": None,
    }.items():
        against = f"--reference {folder}/{part}" if part else f"--fid_stats {fid_stats[0]}"
        run(
            "main_metrics",
            f"--images {folder}/recon {against} {quick_inception.flag} --json {tmp_path}/m.json --num_workers 0",
        )
        expected[name] = json.loads((tmp_path / "m.json").read_text())
    for name, figures in expected.items():
        key = name if name in results else "frechet_inception_distance"
        assert results[key] == pytest.approx(figures["frechet_inception_distance"], rel=1e-3)
        assert results["inception_score_mean"] == pytest.approx(
            figures["inception_score_mean"], rel=1e-3
        )
    assert len(results["entropy_bits"]) == 8 and all(
        0 < bits <= 4 for bits in results["entropy_bits"]
    )


def test_the_sweep_writes_table_1_and_the_figures(run, images, vae_path, tmp_path):
    common = f"--img_size 16 --vae_path {vae_path} --image_dir {images} --num_workers 0 --device cpu --images_per_class 3"
    run("reconstruction", f"{common} --sweep --no_metrics --output_dir {tmp_path}/out")
    folder = tmp_path / "out" / "sweep_n3"
    rows = json.loads((folder / "table1.json").read_text())["rows"]
    by_setting = {(row["bits"], row["range"]): row for row in rows}
    assert set(by_setting) == {
        (-1, 5.0),
        *((b, 5.0) for b in (3, 4, 5, 6)),
        *((6, r) for r in (2.0, 3.0, 4.0)),
    }
    assert by_setting[-1, 5.0]["latent_mse"] == 0
    errors = [by_setting[bits, 5.0]["latent_mse"] for bits in (3, 4, 5, 6)]
    assert errors == sorted(errors, reverse=True)
    table = (folder / "table1.md").read_text()
    assert table.count("\n| ") == 9 and "\n| 8 levels, range 5 |" in table
    for name, columns in {"figure5.png": 3, "figure6.png": 5}.items():
        with Image.open(folder / name) as picture:
            assert picture.size[0] == columns * 130 + 2
    # One setting alone gives the same figures.
    run("reconstruction", f"{common} --bits 4 --no_metrics --output_dir {tmp_path}/out")
    alone = json.loads((tmp_path / "out" / "quant_b4_r5.0_n3" / "results.json").read_text())
    assert (
        alone["psnr_db"] == by_setting[4, 5.0]["psnr_db"]
        and alone["ssim"] == by_setting[4, 5.0]["ssim"]
    )


@pytest.mark.parametrize("statistics", [True, False])
def test_the_papers_numbers_stand_beside_what_they_are_of(
    run, images, vae_path, quick_inception, fid_stats, tmp_path, monkeypatch, statistics
):
    monkeypatch.setattr(
        "util.metrics.compute.fid_statistics_to_metric", lambda *_, **__: {FID: 7.0}
    )
    common = f"--img_size 16 --vae_path {vae_path} --image_dir {images} --num_workers 0 --device cpu --sweep"
    against = f"--fid_stats {fid_stats[0]}" if statistics else ""
    run("reconstruction", f"{common} {quick_inception.flag} {against} --output_dir {tmp_path}/out")
    folder = tmp_path / "out" / "sweep_n50"
    row = json.loads((folder / "table1.json").read_text())["rows"][1]
    assert (
        row["bits"] == 3
        and row["paper_inception_score"] == 250.3
        and row.get("paper_rfid") == (3.69 if statistics else None)
    )
    header, _, _, line = (folder / "table1.md").read_text().splitlines()[:4]
    titles, cells = (
        [cell.strip() for cell in text.strip("|").split("|")] for text in (header, line)
    )
    shown = dict(zip(titles, cells, strict=True))
    assert (
        shown["paper: Inception Score"] == "250.3"
        and titles.index("paper: Inception Score") == titles.index("Inception Score") + 1
    )
    assert [title for title in titles if "rFID" in title] == (
        ["rFID, to the statistics", "paper: rFID, to the statistics"] * statistics
        + ["rFID, to the originals"]
    )
    assert "16 images of 4 classes" in (text := (folder / "table1.md").read_text())
    assert "differ from the paper's: do not compare" in text


@pytest.mark.parametrize(
    ("img_size", "classes", "found"), [(256, 1000, True), (256, 999, False), (32, 1000, False)]
)
def test_statistics_of_imagenet_are_the_default_for_its_images_alone(
    quick_inception, fid_stats, tmp_path, monkeypatch, caplog, img_size, classes, found
):
    monkeypatch.chdir(tmp_path)
    flags = f"--img_size {img_size} {quick_inception.flag}".split()

    def evaluator():
        args = reconstruction.get_args_parser().parse_args(flags)
        return reconstruction.make_rfid_evaluator(args, classes, 4, torch.device("cpu"))

    # Without the file rFID is that to the originals.
    assert evaluator().stats is None
    assert ("no FID statistics at fid_stats/adm_in256_stats.npz" in caplog.text) == found
    (tmp_path / "fid_stats").mkdir()
    shutil.copy(fid_stats[0], tmp_path / "fid_stats" / "adm_in256_stats.npz")
    assert (evaluator().stats is not None) == found


def test_reconstruction_asked_to_measure_needs_what_it_takes(
    refused, images, vae_path, inception, tmp_path
):
    common = f"--img_size 16 --vae_path {vae_path} --image_dir {images} --output_dir {tmp_path}/out --device cpu"
    for flags in (
        f"--inception_weights {tmp_path}/no",
        f"--inception_weights {inception} --fid_stats {tmp_path}/no",
    ):
        assert str(tmp_path / "no") in refused("reconstruction", f"{common} {flags}")
    one = f"{common} --inception_weights {inception} --images_per_class 1"
    for label in range(1, 4):
        shutil.rmtree(images / "train" / f"class{label}")
    assert "too few images for FID: 1, at least 2 are needed" in refused("reconstruction", one)
    assert not (tmp_path / "out").exists()
