"""FID and its relatives against torch-fidelity's own, statistics, and Inception's weights."""

import json
import shutil
from importlib.metadata import version
from unittest import mock

import numpy as np
import pytest
import torch
import torch_fidelity

from tests.conftest import FID
from util.errors import UserError
from util.metrics.compute import compute_metrics, load_statistics
from util.metrics.inception import Inception, find_inception_weights
from util.metrics.networks import LOGITS, POOL


def test_metrics_equal_torch_fidelitys(run, inception, photographs, tmp_path, capsys):
    expected = torch_fidelity.calculate_metrics(
        input1=str(photographs / "blurred"), input2=str(photographs / "sharp"), isc=True, fid=True, prc=True,
        kid=True, kid_subset_size=10,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception), cuda=False,
        verbose=False,
    )  # fmt: skip
    command = f"--images {photographs}/blurred --reference {photographs}/sharp --inception_weights {inception}"
    run(
        "main_metrics",
        f"{command} --json {tmp_path}/figures.json --device cpu --batch_size 7 --num_workers 2",
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-3), name
    assert expected["frechet_inception_distance"] > 0.1 and expected["inception_score_mean"] > 1.001
    assert (
        figures["images"] == 20
        and figures["torch_version"] == version("torch")
        and figures["commit"]
    )
    out = capsys.readouterr()
    assert (
        f"{expected['frechet_inception_distance']:.2f}" in out.out and "FID is too high" in out.err
    )


def test_inception_computes_in_float32_whatever_the_runs_precision(monkeypatch):
    inception = Inception.__new__(Inception)  # without weights
    torch.nn.Module.__init__(inception)
    inception.network = lambda _: (torch.backends.cudnn.allow_tf32, None)
    assert torch.backends.cudnn.allow_tf32 and inception(torch.zeros(1))[0] is False


def spread(count: int, width: float) -> dict[str, torch.Tensor]:
    """Features of images that differ by ``width`` in two dimensions."""
    pool, logits = torch.zeros(count, 2048), torch.zeros(count, 1008)
    pool[:, :2] = width * torch.rand(count, 2)
    logits[:, :4] = torch.rand(count, 4)
    return {POOL: pool, LOGITS: logits}


def test_precision_is_of_the_images_and_recall_of_the_reference(monkeypatch):
    distances = mock.Mock(side_effect=lambda a, b, **_: {FID: 7.0})
    monkeypatch.setattr("util.metrics.compute.fid_statistics_to_metric", distances)
    images, reference = spread(60, 0.01), spread(60, 1.0)
    images[POOL][:, :2] += reference[POOL][0, :2]
    # All images lie among the reference's, which are hardly covered by them.
    figures = compute_metrics(images, None, reference)
    assert figures["precision"] == 1 and figures["recall"] < 0.2 and figures[FID] == 7
    # FID is against the statistics where there are any.
    stats = {"mu": np.ones(2048), "sigma": np.eye(2048)}
    compute_metrics(images, stats, reference)
    assert distances.call_args.args[1] is stats
    assert np.allclose(
        distances.call_args_list[0].args[1]["mu"][:2], reference[POOL][:, :2].mean(0), atol=1e-6
    )
    assert not {"precision", "recall"} & set(compute_metrics(images, stats))
    assert FID not in compute_metrics(images)


def test_damaged_statistics_are_named(tmp_path):
    (tmp_path / "damaged.npz").write_bytes(b"PK no")
    with pytest.raises(UserError, match=r"damaged\.npz is damaged"):
        load_statistics(tmp_path / "damaged.npz")


FINE = {"mu": np.zeros(2048), "sigma": np.eye(2048)}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"mu": np.full(2048, np.nan)}, "mu contains NaN"),
        (
            {"sigma": np.full((2048, 2048), np.nan)},
            "sigma contains NaN or infinity; compute the statistics again",
        ),
        ({"sigma": np.full((2048, 2048), np.inf)}, "sigma contains NaN"),
        ({"sigma": -np.eye(2048)}, "not a covariance"),
        ({"sigma": np.eye(2048) + np.eye(2048, k=1)}, "not a covariance"),
        ({"mu": np.full(2048, "a")}, "mu is <U1 and sigma is float64, expected numbers"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, wrong, words):
    np.savez(tmp_path / "stats.npz", **{**FINE, **wrong})
    with pytest.raises(UserError, match=rf"stats\.npz: .*{words}"):
        load_statistics(tmp_path / "stats.npz")


def test_statistics_may_be_rounded(tmp_path):
    features = np.random.RandomState(0).randn(50, 2048).astype(np.float32)
    sigma = (features - features.mean(0)).T @ (features - features.mean(0)) / 49
    np.savez(tmp_path / "stats.npz", mu=features.mean(0), sigma=sigma + 1e-7 * np.triu(sigma))
    assert load_statistics(tmp_path / "stats.npz")["sigma"].dtype == np.float64


def test_weights_of_inception_that_are_not_finite_are_refused(inception, tmp_path):
    weights = torch.load(inception, weights_only=True)
    weights["fc.weight"][3, 5] = torch.nan
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth is damaged: it contains NaN"):
        Inception(str(tmp_path / "weights.pth"))


def test_missing_weights_are_fetched_once_to_torch_hubs_folder(inception, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fetch = mock.Mock(side_effect=lambda url, place, **_: shutil.copy(inception, place))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert find_inception_weights(None) == find_inception_weights(None)
    assert fetch.call_count == 1 and find_inception_weights(str(inception)) == inception
