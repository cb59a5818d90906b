"""The paper's figures that tools/figures.py draws: what is sampled, and where it is placed."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.tokenbridge import TokenBridge
from tests.conftest import SHORT, TINY, write_maps
from tests.scripts.conftest import grey
from util.data.classes import readable


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_figures_are_commands(run, refused, cached, trained, vae_path, tmp_path):
    train = f"{TINY} {SHORT} --use_cached --cached_path {cached} --epochs 1 --head parallel"
    run("main_tokenbridge", f"{train} --output_dir {tmp_path}/parallel")
    common = f"--vae_path {vae_path} --num_iter 2 --resume {trained}"
    run(
        "tools.figures",
        f"samples {common} --classes class2 1 --per_class 3 --output {tmp_path}/samples.png",
    )
    run(
        "tools.figures",
        f"parallel {common} --resume_parallel {tmp_path}/parallel --output {tmp_path}/parallel.png",
    )
    run("tools.figures", f"confidence {common} --output {tmp_path}/confidence.png")
    for flags in ("", "--quant_calibrate", "--quantizer linear --quant_bits 3"):
        run(
            "tools.figures",
            f"levels --cached_path {cached} --num_workers 0 --output {tmp_path}/levels.png {flags}",
        )
        assert pixels(tmp_path / "levels.png").shape[0] > 300
    # Cells of 128 pixels with 2 between them, 16 above for titles: 2 classes by 3, 4 classes by 2, 4 classes by 3.
    sizes = {"samples": (2, 3), "parallel": (4, 2), "confidence": (4, 3)}
    for name, (columns, rows) in sizes.items():
        assert pixels(tmp_path / f"{name}.png").shape == (16 + 2 + 130 * rows, 2 + 130 * columns, 3)
    for bad, message in {
        f"samples {common} --classes klass2": "did you mean class2",
        f"samples {common} --classes 9": "there are 4",
        f"samples --vae_path {vae_path}": "--resume is missing",
        f"parallel {common} --resume_parallel {trained}": "--resume_parallel needs a model of --head parallel",
        f"samples {common} --output x.jpg": ".png",
        "levels": "--cached_path is missing",
        f"samples {common} --temperature -1": "--temperature -1",
        f"samples {common} --gen_seed -1": "--gen_seed -1",
    }.items():
        assert message in refused("tools.figures", bad)


def test_imagenet_classes_have_names():
    from tools import figures

    names = readable([str(label) for label in range(1000)])
    assert figures.find_classes(["golden retriever", "980", "Tench"], names) == [207, 980, 0]
    assert readable(["n01440764", "mine"]) == ["tench, Tinca tinca", "mine"]
    assert figures.find_classes(None, names[:3]) == [0, 1, 2]


def cell(path, row: int, column: int) -> int:
    """The one grey of a cell of 128 pixels, below titles."""
    with Image.open(path) as picture:
        part = np.array(picture)[18 + 130 * row :, 2 + 130 * column :][:128, :128]
    assert len(np.unique(part)) == 1
    return int(part[0, 0, 0])


def test_figures_sample_as_asked_and_place_what_they_sample(
    run, weights, vae_path, tmp_path, sampler, decoder
):
    greys = [grey(label) for label in range(4)]
    flags = {
        "num_iter": 3, "cfg": 2.5, "cfg_schedule": "constant", "temperature": 0.7, "order": "raster",
        "confidence_noise": 0.4, "first_place": "released",
    }  # fmt: skip
    typed = " ".join(f"--{name} {value}" for name, value in flags.items())
    common = f"--vae_path {vae_path} --resume {tmp_path}/weights --device cpu"
    typed += " --classes 2 1 --per_class 3 --batch_size 4 --precision fp16"
    run("tools.figures", f"samples {common} {typed} --output {tmp_path}/s.png")
    for call in sampler.calls:
        assert {name: call[name] for name in flags} == flags and call["autocast"] == torch.float16
    assert sampler.all("bsz") == [4, 2] and len(set(sampler.joined("seeds"))) == 6
    average = sampler.calls[0]["mask_token"]
    assert [
        [cell(tmp_path / "s.png", row, column) for column in (0, 1)] for row in range(3)
    ] == 3 * [[greys[2], greys[1]]]
    sampler.calls.clear()
    run("tools.figures", f"confidence {common} --no_ema --gen_seed 5 --output {tmp_path}/c.png")
    random, confident = sampler.calls
    assert (random["order"], confident["order"], random["cfg"]) == ("random", "confidence", 3)
    assert random["seeds"] == confident["seeds"] and random["labels"].tolist() == [0, 1, 2, 3]
    assert torch.allclose(1.1 * random["mask_token"], average)
    for row in (0, 1):
        assert [cell(tmp_path / "c.png", row, column) for column in range(4)] == greys
    with Image.open(tmp_path / "c.png") as picture:
        brightness = np.array(picture).astype(int)[18 + 260 :, 2:][16:128:32, 16:128:32].sum(axis=2)
    assert (np.diff(brightness.flatten()) > 0).all()


def test_figure_7_has_the_parallel_head_above(
    run, weights, vae_path, tmp_path, sampler, decoder, monkeypatch
):
    content = torch.load(tmp_path / "weights" / "checkpoint-last.pth", weights_only=True)

    config = {name: value for name, value in content["config"].items() if name != "latent_factor"}
    parallel = TokenBridge.from_config({**config, "head": "parallel"})
    (tmp_path / "parallel").mkdir()
    torch.save(
        {"model": parallel.state_dict(), "config": {**parallel.config, "latent_factor": 0.5}},
        tmp_path / "parallel" / "checkpoint-last.pth",
    )
    note = sampler.note

    def by_head(model, *args, **kwargs):  # classes in the opposite order from the parallel head
        given = note(model, *args, **kwargs)
        return (
            {**given, "labels": 3 - given["labels"]}
            if model.config["head"] == "parallel"
            else given
        )

    monkeypatch.setattr(sampler, "note", by_head)
    common = f"--vae_path {vae_path} --resume {tmp_path}/weights --resume_parallel {tmp_path}/parallel --no_ema"
    run("tools.figures", f"parallel {common} --device cpu --output {tmp_path}/p.png")
    above, below = (
        [cell(tmp_path / "p.png", row, column) for column in range(4)] for row in (0, 1)
    )
    assert above == below[::-1] and below == sorted(below) and below[0] < below[3]
    assert sampler.calls[0]["seeds"] == sampler.calls[1]["seeds"]


@pytest.mark.parametrize("calibrate", [False, True])
def test_figure_3_is_of_scaled_posterior_samples_channel_by_channel(
    run, tmp_path, monkeypatch, calibrate
):
    shown = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.hist", lambda axes, values, **_: shown.append(torch.as_tensor(values))
    )
    stairs = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.stairs",
        lambda axes, values, edges, **_: stairs.append((values, edges)),
    )
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *_, **__: None)
    offsets = torch.tensor([-3.0, 0.0, 3.0])[:, None, None]
    write_maps(tmp_path / "cache", offsets.expand(20, 3, 16, 16))  # of deviation e
    run(
        "tools.figures",
        f"levels --cached_path {tmp_path}/cache --num_workers 0 --quant_bits 3 --num_images 10 "
        f"--output {tmp_path}/levels.png {'--quant_calibrate' * calibrate}",
    )
    together, *channels = shown
    assert together.shape == (3 * 10 * 256,) and [len(values) for values in channels] == 3 * [2560]
    means = [0, 0, 0] if calibrate else [-1.5, 0, 1.5]
    for values, mean in zip(channels, means, strict=True):
        assert values.mean().item() == pytest.approx(mean, abs=0.1)
        assert values.std().item() == pytest.approx(1 if calibrate else 0.5 * np.e, rel=0.05)
    density, edges = stairs[0]
    assert len(density) == 8 and (density * np.diff(edges)).sum() == pytest.approx(1)
    inside = ((together >= edges[3]) & (together < edges[4])).float().mean().item()
    assert density[3] * (edges[4] - edges[3]) == pytest.approx(inside, abs=1e-3)
    assert abs(edges).max() < 6 and edges[4] == pytest.approx(0, abs=1e-5)
