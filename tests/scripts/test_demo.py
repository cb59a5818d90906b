"""The demo, run once."""

import json
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from demo.demo import digit_classifier, read_digits, remove_earlier
from models.pipeline import TokenBridgePipeline
from models.vae import DiagonalGaussianDistribution
from reconstruction import post_training_quantize
from tests.conftest import ROOT
from tests.scripts.tour import PATH, executed, kinds
from util.data.caches import CachedFolder


@pytest.fixture(scope="module")
def demo():
    """The folder that ``make demo`` writes."""
    subprocess.run([sys.executable, "demo/demo.py"], cwd=ROOT, check=True)
    return ROOT / "output" / "demo"


def test_a_new_demo_leaves_what_the_one_before_did_not_make(tmp_path):
    for name in (
        "data/train/0/1.png",
        "samples/00000.png",
        "samples.png",
        "vae-last.1.pth",
        "events.out.tfevents.1.x",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "generated.png").touch()
    remove_earlier(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["generated.png"]


@pytest.mark.slow
def test_the_demo_makes_digits(demo):
    results = json.loads((demo / "results.json").read_text())
    assert results["recognized_samples"] >= 0.9 and results["recognized_val"] > 0.95
    for name in ("reconstruction.png", "samples.png", "loss.png"):
        with Image.open(demo / name) as picture:
            assert min(picture.size) > 100
    names = [f"{number:05d}.png" for number in range(100)]
    assert sorted(path.name for path in (demo / "samples").iterdir()) == names
    # The enlarged digits reduce to the originals.
    digits = load_digits()
    paths = sorted((demo / "data").glob("*/*/*.png"), key=lambda path: path.name)
    for path, original, digit in zip(paths, digits.images, digits.target, strict=True):
        with Image.open(path) as image:
            reduced = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert path.parent.name == str(digit) and np.array_equal(
            np.round(reduced * 16 / 255), original
        )


@pytest.mark.slow
def test_covered_halves_of_held_out_digits_are_completed(demo, tmp_path):
    paths = sorted((demo / "data" / "val").glob("*/*.png"), key=lambda path: path.name)[:200]
    digits = np.array([int(path.parent.name) for path in paths])
    lower = Image.new("L", (16, 16))
    lower.paste(255, (0, 8, 16, 16))
    pipe, classifier = TokenBridgePipeline.from_pretrained(demo), digit_classifier(demo / "data")

    def completed(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of the completed digits, and what the classifier takes them for."""
        how = {"num_iter": 16, "cfg": 2.0, "temperature": 0.95}  # as the demo samples
        images = pipe(
            labels.tolist(), image=paths, mask_image=lower, seeds=range(len(paths)), **how
        ).images
        files = [tmp_path / f"{number:03d}.png" for number in range(len(images))]
        for image, file in zip(images, files, strict=True):
            image.save(file)
        return np.stack([np.asarray(image) for image in images]), classifier.predict(
            read_digits(files)
        )

    right, recognized = completed(digits)
    assert (recognized == digits).mean() >= 0.9
    originals = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    assert np.array_equal(right[:, :8], originals[:, :8])
    covered = read_digits(paths)
    covered[:, 32:] = 0
    assert classifier.score(covered, digits) < 0.5  # the upper half alone is not enough
    # As another class they become something else.
    other, recognized = completed((digits + 1) % 10)
    assert np.array_equal(other[:, :8], originals[:, :8])
    assert (other[:, 8:] != right[:, 8:]).any(axis=(1, 2, 3)).all()
    assert (recognized == digits).mean() < 0.5


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom(demo):
    notebook = executed()
    stored = nbformat.read(PATH, as_version=4)
    assert kinds(stored) == kinds(notebook), "run python -m tests.scripts.tour"
    assert PATH.stat().st_size < 200_000  # code hosts show it without running it
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
    assert "upper half unchanged: True" in "".join(output.get("text", "") for output in outputs)


def lloyd_max_error(values: torch.Tensor, levels: int) -> float:
    """Mean squared error of the best scalar quantizer of ``values``, by Lloyd's iteration."""
    values = values.double().sort().values
    centres = values[torch.linspace(0, len(values) - 1, levels + 2).long()[1:-1]].clone()
    for _ in range(1000):
        nearest = torch.bucketize(values, (centres[1:] + centres[:-1]) / 2)
        sums, counts = (
            torch.zeros(levels).double().index_add(0, nearest, v)
            for v in (values, torch.ones_like(values))
        )
        centres = torch.where(counts > 0, sums / counts, centres)
    return (values - centres[nearest]).square().mean().item()


@pytest.mark.slow
def test_quantizing_a_trained_tokenizers_latents(demo, run, tmp_path):
    run(
        "reconstruction",
        f"--sweep --no_metrics --img_size 16 --num_workers 0 --vae_path {demo}/vae.ckpt --image_dir {demo}/data/train "
        f"--output_dir {tmp_path} --images_per_class 100",
    )
    rows = json.loads((tmp_path / "sweep_n100" / "table1.json").read_text())["rows"]
    errors = {(row["bits"], row["range"]): row["latent_mse"] for row in rows}
    for worse, better in (((3, 5.0), (4, 5.0)), ((4, 5.0), (5, 5.0)), ((5, 5.0), (6, 5.0))):
        assert errors[worse] > errors[better]
    for worse, better in (((6, 2.0), (6, 3.0)), ((6, 3.0), (6, 4.0)), ((6, 4.0), (6, 5.0))):
        assert errors[worse] > errors[better]

    cache = CachedFolder(demo / "cache", mirror=False)
    moments = torch.stack([moments for moments, _ in cache])
    latents = DiagonalGaussianDistribution(moments).sample() * cache.metadata["latent_factor"]
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    error = (post_training_quantize(latents, 6, -5.0, 5.0)[1] - latents).square().mean().item()
    best = lloyd_max_error(latents.flatten(), 64)
    assert best < error < 1.05 * best
