"""EfficientNet and DINOv2: weights, preprocessing, metrics that name their features."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.fill import deterministic_fill
from util.metrics.compute import load_statistics
from util.metrics.networks import LOGITS, POOL, DINOv2, EfficientNet, map_distance


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory):
    """Random weights of EfficientNet-Lite0 under the names of the package with its weights."""
    torch.manual_seed(0)
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    names = {"conv_stem.weight": "_conv_stem.weight"}
    path = tmp_path_factory.mktemp("efficientnet") / "weights.pth"
    torch.save({names.get(name, f"_{name}"): value for name, value in weights.items()}, path)
    return path


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """Filled weights of DINOv2's small network for images of 518 pixels, as published."""
    path = tmp_path_factory.mktemp("dinov2") / "model.safetensors"
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    save_file(deterministic_fill(network.state_dict()), path)
    return path


IMAGES = torch.randint(
    0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def test_efficientnet_computes_timms_features_of_the_resized_image(efficientnet):
    network = EfficientNet(str(efficientnet))
    features, logits, *_ = network(IMAGES)
    own = timm.create_model("tf_efficientnet_lite0").eval()
    own.load_state_dict(
        dict(
            zip(own.state_dict(), torch.load(efficientnet, weights_only=True).values(), strict=True)
        )
    )
    images = np.stack(
        [
            np.asarray(
                Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC)
            )
            for image in IMAGES
        ]
    )
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.no_grad():
        expected = own(pixels)
    assert features.shape == (3, 1280) == (3, network.widths[POOL])
    assert torch.allclose(logits, expected, atol=0.02 * expected.abs().max().item())
    assert network.widths[LOGITS] == logits.shape[1] == 1000


def test_distance_of_maps_is_zero_for_equal_images_only(efficientnet):
    network = EfficientNet(str(efficientnet))
    other = IMAGES.clone()
    other[1] = 255 - other[1]
    features, others = network(IMAGES), network(other)
    distance = map_distance(features, others)
    assert distance[0] == distance[2] == 0 and distance[1] > 0.01
    assert torch.allclose(map_distance(others, features), distance)


@pytest.mark.skipif(
    not EfficientNet.default_weights().endswith(".pth"), reason="the weights are not installed"
)
def test_installed_weights_recognize_a_photograph():
    from sklearn.datasets import load_sample_images

    flower = load_sample_images().images[1]
    image = torch.from_numpy(flower.copy()).permute(2, 0, 1)[None, :, :, 100:527]
    assert EfficientNet(None)(image).logits.argmax().item() in (
        985,
        986,
        309,
        723,
    )  # daisy and its like


def test_dinov2_takes_its_size_from_the_weights(dinov2):
    network = DINOv2(str(dinov2))
    features, logits, *_ = network(IMAGES)
    assert features.shape == (3, 384) and logits.shape == (3, 0)
    assert features.isfinite().all() and not torch.allclose(features[0], features[1])


def test_metrics_name_their_features(run, efficientnet, dinov2, photographs, tmp_path, capsys):
    common = f"--images {photographs}/blurred --reference {photographs}/sharp --device cpu"
    common += f" --num_workers 0 --json {tmp_path}/m.json"
    for name, weights in {"efficientnet": efficientnet, "dinov2": dinov2}.items():
        run("main_metrics", f"{common} --features {name} --feature_weights {weights}")
        metrics = json.loads((tmp_path / "m.json").read_text())
        assert metrics[f"frechet_{name}_distance"] > 0
        assert {f"kernel_{name}_distance_mean", f"{name}_precision", f"{name}_recall"} <= {*metrics}
        assert (f"{name}_score_mean" in metrics) == (name == "efficientnet")
        assert not any("inception" in key for key in metrics if key not in ("args",))
        out = capsys.readouterr().out
        assert not re.search("FID|KID|Inception", out)
        assert all(re.search(r"\((EfficientNet-Lite0|DINOv2)\)", line) for line in out.splitlines())


def test_statistics_are_bound_to_their_features(run, refused, efficientnet, photographs, tmp_path):
    common = f"--images {photographs}/sharp --device cpu --num_workers 0"
    flags = f"{common} --features efficientnet --feature_weights {efficientnet}"
    run("main_metrics", f"{flags} --save_stats {tmp_path}/stats.npz")
    stats = load_statistics(tmp_path / "stats.npz", EfficientNet)
    assert stats["mu"].shape == (1280,)
    run("main_metrics", f"{flags} --fid_stats {tmp_path}/stats.npz --json {tmp_path}/m.json")
    distance = json.loads((tmp_path / "m.json").read_text())["frechet_efficientnet_distance"]
    assert abs(distance) < 1e-3
    line = refused("main_metrics", f"{common} --fid_stats {tmp_path}/stats.npz")
    assert "statistics of efficientnet features: pass --features efficientnet" in line


def test_missing_and_wrong_weights_are_refused(refused, inception, photographs, tmp_path):
    common = f"--images {photographs}/sharp --device cpu --features"
    line = refused("main_metrics", f"{common} dinov2 --feature_weights {tmp_path}/none.pth")
    assert "no weights of DINOv2 at" in line and "--feature_weights" in line
    for name, title in {"dinov2": "DINOv2", "efficientnet": "EfficientNet-Lite0"}.items():
        line = refused("main_metrics", f"{common} {name} --feature_weights {inception}")
        assert f"does not contain the weights of {title}" in line
