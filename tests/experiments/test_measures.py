"""Measures and statistics against independent implementations."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from experiments.features import FeatureNet, load_net, read_images
from experiments.measures import (
    all_images,
    compare,
    level_bits,
    neighborhood_metrics,
    pixels,
    share_recognized,
)
from experiments.results import confidence_interval, prediction_interval, verdict
from experiments.unequal import scale_channels
from models.quantizer import build_quantizer
from models.vae import AutoencoderKL
from tests.conftest import filled
from util.model_config import ModelConfig


def brute_force(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Return precision, recall, density and coverage by their definitions, pair by pair."""

    def radius(points: np.ndarray, k: int, n: int) -> float:
        others = [other for m, other in enumerate(points) if m != n]
        return sorted(np.linalg.norm(points[n] - other) for other in others)[k - 1]

    def inside(point: np.ndarray, points: np.ndarray, k: int) -> list[bool]:
        distances = [np.linalg.norm(point - center) for center in points]
        return [bool(distance < radius(points, k, n)) for n, distance in enumerate(distances)]

    return {
        "precision": np.mean([any(inside(point, real, 3)) for point in generated]),
        "recall": np.mean([any(inside(point, generated, 3)) for point in real]),
        "density": np.mean([sum(inside(point, real, 5)) / 5 for point in generated]),
        "coverage": np.mean(np.any([inside(point, real, 5) for point in generated], axis=0)),
    }


@pytest.mark.parametrize("shift", [0.0, 1.0, 9.0])
def test_neighborhood_metrics_equal_their_definitions(shift):
    generated, real = torch.randn(17, 3).double() + shift, torch.randn(13, 3).double()
    expected = brute_force(generated.numpy(), real.numpy())
    assert neighborhood_metrics(generated, real) == pytest.approx(expected)


def test_frechet_distance_of_gaussians():
    # If covariances commute: |difference of means|^2 + sum of (differences of stds)^2.
    points = torch.randn(400, 4, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(points.T.cov())
    white = (points - points.mean(0)) @ vectors / values.sqrt()
    std1, std2 = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([2.0, 2, 1, 5]).double()
    generated, real = white * std1 + 3, white * std2
    expected = 4 * 9 + ((std1 - std2) ** 2).sum().item()
    assert compare(generated, real)["frechet"] == pytest.approx(expected, rel=1e-6)
    assert compare(generated, generated)["frechet"] == pytest.approx(0, abs=1e-6)


def test_too_few_images_are_refused(refused, tmp_path):
    torch.save({"net": "plain", "weights": FeatureNet(2).state_dict()}, tmp_path / "net.pt")
    for number in range(6):
        for name in ["five"] * (number < 5) + ["six"]:
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), (number, 9, 9)).save(tmp_path / name / f"{number}.png")
    common = f"--features {tmp_path}/net.pt --json {tmp_path}/m.json --device cpu"
    common += f" --images {tmp_path}/six"
    line = refused("experiments.measures", f"{common} --reference {tmp_path}/five")
    assert "too few reference images for precision and recall: 5, at least 6" in line
    line = refused("experiments.measures", f"{common} --reference {tmp_path}/six --limit 3")
    assert f"too few images in {tmp_path}/six for precision and recall: 3, at least 4" in line
    assert not (tmp_path / "m.json").exists()


def test_images_in_the_order_of_their_classes_are_recognized():
    net = FeatureNet(2).eval()
    net.forward = lambda images: torch.eye(2)[images[:, 0, 0, 0].long()]
    images = torch.tensor([0, 0, 1, 1, 1, 0], dtype=torch.uint8)[:, None, None, None]
    assert (
        share_recognized(net, images) == 4 / 6
    )  # the third and the last belong to the other class
    assert share_recognized(net, images[:5]) is None


def test_verdicts_where_nothing_is_random():
    assert verdict([0.3], "higher", 0.1) == "inconclusive (1 of 1 seeds agree)"
    assert verdict([0.3], "higher", 0.1, exact=True) == "holds"
    assert verdict([0.3], "not higher", 0.1, exact=True) == "does not hold"
    assert verdict([0.3], "not higher", 0.4, exact=True) == "holds"


def test_limited_images_are_evenly_spaced(tmp_path):
    for number in range(10):
        Image.new("L", (2, 2), number).convert("RGB").save(tmp_path / f"{number}.png")
    assert all_images(tmp_path, 4)[:, 0, 0, 0].tolist() == [0, 2, 5, 7]
    for limit in (None, 11):
        assert all_images(tmp_path, limit)[:, 0, 0, 0].tolist() == [*range(10)]


def test_pixels_are_averages():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    corner = images[1, :, :2, 2:4].double().mean((1, 2)) * 16 / 255
    assert torch.allclose(pixels(images, gray=False)[1].view(3, 8, 8)[:, 0, 1], corner)
    assert pixels(images, gray=True)[1, 1].item() == pytest.approx(corner.mean().item())


@pytest.mark.parametrize("quantizer", ["gaussian", "linear"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_density_of_each_level_integrates_to_one(quantizer, calibrated):
    channels = {"channel_mean": [0.5, -1.0], "channel_std": [0.3, 2.0]} if calibrated else {}
    levels = build_quantizer(
        ModelConfig(quant_levels=8, quantizer=quantizer, vae_embed_dim=2, **channels)
    )
    x = torch.linspace(-60, 60, 600_001, dtype=torch.float64)
    latents = x[:, None].expand(-1, 2)
    index = levels(latents.float())[0]
    for channel in range(2):
        density = 2 ** -level_bits(levels, latents)[:, channel]
        mass = torch.zeros(8, dtype=torch.float64)
        mass.index_add_(0, index[:, channel], density * (x[1] - x[0]))
        assert torch.allclose(mass, torch.ones(8).double(), atol=5e-3)  # error of the grid


def test_bits_do_not_depend_on_the_scale_of_a_calibrated_channel():
    latents = torch.randn(500, 1)
    bits = {}
    for scale in (1.0, 7.0):
        calibration = {"channel_mean": [0.0], "channel_std": [scale]}
        levels = build_quantizer(ModelConfig(quant_levels=8, vae_embed_dim=1, **calibration))
        bits[scale] = level_bits(levels, scale * latents).mean().item() - math.log2(scale)
    assert bits[1.0] == pytest.approx(bits[7.0], abs=1e-4)


@torch.no_grad()
def test_unequal_channels_give_the_same_reconstruction():
    vae = filled(AutoencoderKL(8, (1, 1, 2), ch=8, num_res_blocks=1)).eval()
    images, scales = torch.rand(3, 3, 16, 16) * 2 - 1, torch.logspace(0, 1, 8, base=16.0)
    before = vae.encode(images)
    reconstructed = vae.decode(before.mean)
    scale_channels(vae, scales)
    after, factor = vae.encode(images), scales[:, None, None]
    assert torch.allclose(after.mean, before.mean * factor, atol=1e-4)
    assert torch.allclose(after.std, before.std * factor, atol=1e-4)
    assert torch.allclose(vae.decode(after.mean), reconstructed, atol=1e-4)


def test_features_are_standardized_before_the_relu():
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    net = FeatureNet(4).eval()
    raw = net.features(images)
    net.mean, net.std = raw.mean(0), raw.std(0)
    features = net.features(images)
    assert features.mean(0).abs().max() < 1e-4
    assert torch.allclose(features.std(0), torch.ones(64), atol=1e-4)
    assert ((features < 0).double().mean(0) > 0.05).all()  # before the ReLU


def test_intervals_are_students():
    values = [3.0, 5.0, 4.0, 8.0]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert confidence_interval(values) == pytest.approx(expected)
    # The prediction interval contains one more value with probability 0.95.
    hits = []
    for *known, value in np.random.RandomState(0).standard_normal((4000, 4)).tolist():
        low, high = prediction_interval(known)
        hits.append(low < value < high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.01)
    assert confidence_interval([1.0]) is None and prediction_interval([1.0, 2.0]) is None


@pytest.mark.parametrize(
    ("differences", "expected", "result"),
    [
        ([-2, -2.1, -1.9], "lower", "holds"),
        ([-2, -2.1, -1.9], "higher", "does not hold"),
        ([2, 2.1, 1.9], "not higher", "holds"),  # within the margin of 10
        ([12, 12.1, 11.9], "not higher", "does not hold"),
        ([-12, -12.1, -11.9], "not lower", "does not hold"),
        ([-2, 3, -1], "lower", "inconclusive (2 of 3 seeds agree)"),
        ([-2], "lower", "inconclusive (1 of 1 seeds agree)"),
    ],
)
def test_verdicts(differences, expected, result):
    assert verdict(differences, expected, 10.0) == result


def test_held_out_images_get_the_labels_of_training_classes(images):
    for label, name in enumerate(("00", "1", "02", "3")):
        shutil.copytree(images / "train" / f"class{label}", images / "val" / name)
    _, labels, classes = read_images(str(images), "train", 16)
    _, held_out_labels, _ = read_images(str(images), "val", 16, classes)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert held_out_labels.tolist() == [0] * 4 + [2] * 4 + [1] * 4 + [3] * 4


def test_without_reference_only_reconstructions_are_read(run, refused, tmp_path):
    (tmp_path / "out" / "quant_b6").mkdir(parents=True)
    content = {"psnr_db": 30.5, "ssim": 0.9, "efficientnet_same_class_share": 0.8, "bits": 6}
    (tmp_path / "out" / "quant_b6" / "results.json").write_text(json.dumps(content))
    run("experiments.measures", f"--images {tmp_path}/out --json {tmp_path}/m.json --device cpu")
    measured = json.loads((tmp_path / "m.json").read_text())
    assert measured["images"] == {"images": {}} and "bits" not in measured
    assert {name: measured[name] for name in content if name != "bits"}.items() <= content.items()
    line = refused("experiments.measures", f"--images x --reference y --json {tmp_path}/m.json")
    assert "--features is missing" in line


def test_a_residual_classifier_learns_from_shifted_images(run, tmp_path):
    for split, count in {"train": 24, "val": 8}.items():
        for label, color in {"dark": 40, "light": 200}.items():
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                noise = np.random.RandomState(number).randint(-30, 30, (16, 16, 3))
                Image.fromarray((noise + color).astype(np.uint8)).save(folder / f"{number}.png")
    flags = f"--data_path {tmp_path}/images --img_size 16 --net resnet --shift 2 --epochs 20"
    run("experiments.features", f"{flags} --batch_size 8 --device cpu --output {tmp_path}/net.pt")
    assert json.loads((tmp_path / "net.json").read_text())["accuracy"] > 0.9
    net = load_net(tmp_path / "net.pt", torch.device("cpu"))
    assert net.features(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 64)
