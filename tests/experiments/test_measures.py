"""What is measured, against computations of another kind."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from experiments.features import FeatureNet, read_images
from experiments.measures import all_images, compare, level_bits, neighbourhoods, pixels
from experiments.results import interval, verdict
from experiments.unequal import scale_channels
from models.quantizer import build_quantizer
from models.vae import AutoencoderKL
from tests.conftest import filled
from util.model_config import ModelConfig


def brute_force(made: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Precision, recall, density and coverage by their definitions, one pair of points after the other."""

    def radius(points: np.ndarray, k: int, n: int) -> float:
        return sorted(np.linalg.norm(points[n] - other) for m, other in enumerate(points) if m != n)[k - 1]

    def inside(point: np.ndarray, points: np.ndarray, k: int) -> list[bool]:
        return [bool(np.linalg.norm(point - center) < radius(points, k, n)) for n, center in enumerate(points)]

    return {
        "precision": np.mean([any(inside(point, real, 3)) for point in made]),
        "recall": np.mean([any(inside(point, made, 3)) for point in real]),
        "density": np.mean([sum(inside(point, real, 5)) / 5 for point in made]),
        "coverage": np.mean(np.any([inside(point, real, 5) for point in made], axis=0)),
    }


@pytest.mark.parametrize("shift", [0.0, 1.0, 9.0])
def test_neighbourhoods_follow_their_definitions(shift):
    made, real = torch.randn(17, 3).double() + shift, torch.randn(13, 3).double()
    assert neighbourhoods(made, real) == pytest.approx(brute_force(made.numpy(), real.numpy()))


def test_the_frechet_distance_of_gaussians_is_known():
    # Of points whose covariances commute: |difference of means|^2 + sum of (differences of deviations)^2.
    points = torch.randn(400, 4, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(points.T.cov())
    white = (points - points.mean(0)) @ vectors / values.sqrt()
    one, two = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([2.0, 2, 1, 5]).double()
    made, real = white * one + 3, white * two
    assert compare(made, real)["frechet"] == pytest.approx(4 * 9 + ((one - two) ** 2).sum().item(), rel=1e-6)
    assert compare(made, made)["frechet"] == pytest.approx(0, abs=1e-6)


def test_too_few_images_to_compare_are_refused(refused, tmp_path):
    torch.save(FeatureNet(2).state_dict(), tmp_path / "net.pt")
    for number in range(6):
        for name in ["five"] * (number < 5) + ["six"]:
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (16, 16), (number, 9, 9)).save(tmp_path / name / f"{number}.png")
    common = f"--features {tmp_path}/net.pt --json {tmp_path}/m.json --device cpu --images {tmp_path}/six"
    line = refused("experiments.measures", f"{common} --reference {tmp_path}/five")
    assert "too few reference images for precision and recall: 5, at least 6" in line
    line = refused("experiments.measures", f"{common} --reference {tmp_path}/six --limit 3")
    assert f"too few images in {tmp_path}/six for precision and recall: 3, at least 4" in line
    assert not (tmp_path / "m.json").exists()


def test_some_of_many_images_are_spaced_evenly(tmp_path):
    for number in range(10):
        Image.new("L", (2, 2), number).convert("RGB").save(tmp_path / f"{number}.png")
    assert all_images(tmp_path, 4)[:, 0, 0, 0].tolist() == [0, 2, 5, 7]
    assert all_images(tmp_path)[:, 0, 0, 0].tolist() == all_images(tmp_path, 11)[:, 0, 0, 0].tolist() == [*range(10)]


def test_pixels_are_averages_of_squares():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    corner = images[1, :, :2, 2:4].double().mean((1, 2)) * 16 / 255
    assert torch.allclose(pixels(images, gray=False)[1].view(3, 8, 8)[:, 0, 1], corner)
    assert pixels(images, gray=True)[1, 1].item() == pytest.approx(corner.mean().item())


@pytest.mark.parametrize("quantizer", ["gaussian", "linear"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_levels_have_the_density_of_their_probability(quantizer, calibrated):
    channels = {"channel_mean": [0.5, -1.0], "channel_std": [0.3, 2.0]} if calibrated else {}
    levels = build_quantizer(ModelConfig(quant_levels=8, quantizer=quantizer, vae_embed_dim=2, **channels))
    x = torch.linspace(-60, 60, 600_001, dtype=torch.float64)
    latents = x[:, None].expand(-1, 2)
    index = levels(latents.float())[0]
    for channel in range(2):
        density = 2 ** -level_bits(levels, latents)[:, channel]
        mass = torch.zeros(8, dtype=torch.float64).index_add(0, index[:, channel], density * (x[1] - x[0]))
        assert torch.allclose(mass, torch.ones(8).double(), atol=5e-3)  # a grid's ends


def test_bits_do_not_depend_on_the_scale_of_a_calibrated_channel():
    latents = torch.randn(500, 1)
    of = {}
    for scale in (1.0, 7.0):
        calibration = {"channel_mean": [0.0], "channel_std": [scale]}
        levels = build_quantizer(ModelConfig(quant_levels=8, vae_embed_dim=1, **calibration))
        of[scale] = level_bits(levels, scale * latents).mean().item() - math.log2(scale)
    assert of[1.0] == pytest.approx(of[7.0], abs=1e-4)


@torch.no_grad()
def test_unequal_channels_reconstruct_the_same():
    vae = filled(AutoencoderKL(8, (1, 1, 2), ch=8, num_res_blocks=1)).eval()
    images, scales = torch.rand(3, 3, 16, 16) * 2 - 1, torch.logspace(0, 1, 8, base=16.0)
    before = vae.encode(images)
    reconstructed = vae.decode(before.mean)
    scale_channels(vae, scales)
    after, by_channel = vae.encode(images), scales[:, None, None]
    assert torch.allclose(after.mean, before.mean * by_channel, atol=1e-4)
    assert torch.allclose(after.std, before.std * by_channel, atol=1e-4)
    assert torch.allclose(vae.decode(after.mean), reconstructed, atol=1e-4)


def test_features_are_standardized_and_none_of_them_is_rare():
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    net = FeatureNet(4).eval()
    raw = net.features(images)
    net.mean, net.std = raw.mean(0), raw.std(0)
    features = net.features(images)
    assert features.mean(0).abs().max() < 1e-4 and torch.allclose(features.std(0), torch.ones(64), atol=1e-4)
    assert ((features < 0).double().mean(0) > 0.05).all()  # before the ReLU


def test_intervals_are_students():
    values = [3.0, 5.0, 4.0, 8.0]
    assert interval(values, 0) == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.95))
    # One more value is in it in 95 of 100 cases.
    draws = np.random.RandomState(0).standard_normal((4000, 4))
    hits = [low < value < high for *few, value in draws.tolist() for low, high in [interval(few, 1)]]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.01)
    assert interval([1.0], 0) is None and interval([1.0, 2.0], 1) is None


@pytest.mark.parametrize(
    ("differences", "expected", "told"),
    [
        ([-2, -2.1, -1.9], "lower", "holds"),
        ([-2, -2.1, -1.9], "higher", "does not hold"),
        ([2, 2.1, 1.9], "not higher", "holds"),  # 10 are allowed
        ([12, 12.1, 11.9], "not higher", "does not hold"),
        ([-12, -12.1, -11.9], "not lower", "does not hold"),
        ([-2, 3, -1], "lower", "cannot be told; so in 2 of 3"),
        ([-2], "lower", "cannot be told; so in 1 of 1"),
    ],
)
def test_verdicts(differences, expected, told):
    assert verdict(differences, expected, 10.0) == told


def test_held_out_images_have_the_labels_of_training(images):
    for label, name in enumerate(("00", "1", "02", "3")):
        shutil.copytree(images / "train" / f"class{label}", images / "val" / name)
    _, labels, classes = read_images(str(images), "train", 16)
    _, truth, _ = read_images(str(images), "val", 16, classes)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert truth.tolist() == [0] * 4 + [2] * 4 + [1] * 4 + [3] * 4
