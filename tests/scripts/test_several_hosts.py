"""Processes on two hosts that do not see the same files: both end with one line, or go on alike."""

import json
import re
import shutil
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.conftest import FID
from tests.scripts.conftest import BASE
from util import misc, sources
from util.sample_folder import SampleFolder


@pytest.fixture
def ended(two_hosts):
    """Runs a script on both hosts, where it must end with status 2 and one line, which it returns."""

    def run(script: str, command: str) -> str:
        (line,) = [line for line in two_hosts(script, command, status=2) if "error:" in line]
        assert line.startswith("error:")  # of the main process
        return line

    return run


@pytest.fixture
def evaluate(weights) -> str:
    """Flags that sample eight images in four chunks."""
    return f"{weights} --evaluate --num_images 8 --eval_bsz 2 --num_workers 0"


# --------------------------------------------------------------------------------------------------------------------
# Folders that must be shared, checked before there is work to lose.


@pytest.mark.parametrize("during_training", [False, True])
def test_images_that_would_lie_on_disks_of_their_own(
    ended, evaluate, cached, vae_path, tmp_path, sampler, during_training
):
    if during_training:
        evaluate = f"{BASE} --use_cached --cached_path {cached} --vae_path {vae_path} --epochs 1 --online_eval"
        evaluate += " --num_images 4"
    line = ended("main_tokenbridge", f"{evaluate} --no_metrics --output_dir out")
    assert "out must be on a disk that all machines share" in line and "(1 of 2 processes, on host1)" in line
    assert not list(tmp_path.glob("host?/out/**/*.*"))  # neither images nor checkpoints


def test_moments_that_would_lie_on_disks_of_their_own(ended, images, vae_path, tmp_path):
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0"
    assert "cache must be on a disk that all" in ended("main_cache", f"{command} --cached_path cache")
    assert not list(tmp_path.glob("host?/cache/**/*.*"))


def test_reconstructions_that_would_lie_on_disks_of_their_own(ended, images, vae_path, tmp_path):
    command = f"--img_size 16 --vae_path {vae_path} --image_dir {images} --num_workers 0 --no_metrics"
    assert "out/quant_b6_r5.0_n50 must be on a disk" in ended("reconstruction", f"{command} --output_dir out")
    assert not list(tmp_path.glob("host?/out/*/*"))


# --------------------------------------------------------------------------------------------------------------------
# Listings that are late.


@pytest.fixture
def late(monkeypatch):
    """``late(seconds)``: how long the second process sees no image 7 once it is there."""

    def hide(seconds: float) -> None:
        first = []

        def hidden(path: Path) -> bool:
            if path.name != "00007.png" or misc.is_main_process():
                return False
            first[:] = first or [time.monotonic()]
            return time.monotonic() < first[0] + seconds

        glob, paths_in = Path.glob, sources.paths_in
        monkeypatch.setattr(Path, "glob", lambda *args: (path for path in glob(*args) if not hidden(path)))
        monkeypatch.setattr(sources, "paths_in", lambda *args: [p for p in paths_in(*args) if not hidden(Path(p))])

    return hide


def test_images_that_another_host_wrote_are_waited_for(two_hosts, evaluate, tmp_path, sampler, decoder, late):
    late(0.1)
    two_hosts("main_tokenbridge", f"{evaluate} --no_metrics --output_dir {tmp_path}/out")


def test_and_missed_in_one_line(ended, evaluate, tmp_path, sampler, decoder, late):
    late(1000)
    line = ended("main_tokenbridge", f"{evaluate} --no_metrics --output_dir {tmp_path}/out")
    assert "holds 7 images, not 8" in line and "(1 of 2 processes, on host1)" in line


# --------------------------------------------------------------------------------------------------------------------
# Decisions that the main process makes for all.


def test_what_a_search_has_measured_before(
    two_hosts, evaluate, tmp_path, sampler, decoder, quick_inception, fid_stats, measured, monkeypatch
):
    results = SampleFolder.results
    monkeypatch.setattr(SampleFolder, "results", lambda self: results(self) if misc.is_main_process() else {})
    monkeypatch.setattr("evaluation.write_search", lambda rows, out: (out / "rows.json").write_text(json.dumps(rows)))
    for host in ("host0", "host1"):  # copies of other times
        shutil.copytree(tmp_path / "weights", tmp_path / host / "weights")
    command = f"{evaluate.replace(f'--resume {tmp_path}/weights', '--resume weights')} --cfg 1 2 --output_dir "
    command += f"{tmp_path}/out --fid_stats {fid_stats[0]} {quick_inception.flag}"
    two_hosts("main_tokenbridge", command)
    first = (tmp_path / "out" / "samples-cfg1-t1.json").stat().st_mtime_ns
    (tmp_path / "out" / "samples-cfg2-t1.json").unlink()
    two_hosts("main_tokenbridge", command)
    assert (tmp_path / "out" / "samples-cfg1-t1.json").stat().st_mtime_ns == first
    assert [row[FID] for row in json.loads((tmp_path / "out" / "rows.json").read_text())] == [1, 1]


# --------------------------------------------------------------------------------------------------------------------
# Files that one host lacks.


def test_evaluation_without_inception_on_one_host(
    two_hosts, ended, evaluate, tmp_path, sampler, decoder, quick_inception, fid_stats, measured
):
    (tmp_path / "inception.pth").rename(tmp_path / "host0" / "inception.pth")
    command = f"{evaluate} --output_dir {tmp_path}/out --inception_weights inception.pth"
    line = ended("main_tokenbridge", f"{command} --fid_stats {fid_stats[0]}")
    assert "no Inception weights at inception.pth" in line and "on host1)" in line
    assert not list((tmp_path / "out").rglob("*.*"))
    # Statistics are the main process's alone.
    shutil.copy(tmp_path / "host0" / "inception.pth", tmp_path / "host1")
    shutil.copy(fid_stats[0], tmp_path / "host0" / "stats.npz")
    two_hosts("main_tokenbridge", f"{command} --fid_stats stats.npz")
    assert json.loads((tmp_path / "out" / "samples.json").read_text())[FID] == 1
    assert "no FID statistics at gone.npz" in ended("main_tokenbridge", f"{command} --fid_stats gone.npz")


def test_reconstruction_without_inception_on_one_host_measures_the_rest(
    two_hosts, images, vae_path, tmp_path, quick_inception, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", ".")
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("no network")))
    checkpoints = tmp_path / "host0" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (tmp_path / "inception.pth").rename(checkpoints / "weights-inception-2015-12-05-6726825d.pth")
    command = f"--img_size 16 --vae_path {vae_path} --image_dir {images} --num_workers 0 --output_dir {tmp_path}/out"
    said = two_hosts("reconstruction", command)
    (line,) = [line for line in said if "without rFID and Inception Score" in line]
    assert "on host1)" in line
    assert "psnr_db" in json.loads((tmp_path / "out" / "quant_b6_r5.0_n50" / "results.json").read_text())


def test_other_images_on_one_host(ended, images, vae_path, tmp_path, quick_inception):
    for host in ("host0", "host1"):
        shutil.copytree(images, tmp_path / host / "data")
    (tmp_path / "host1" / "data" / "train" / "class0" / "3.png").unlink()
    common = f"--img_size 16 --vae_path {vae_path} --num_workers 0"
    for script, command in {
        "main_cache": f"{common} --data_path data --cached_path {tmp_path}/cache",
        "reconstruction": f"{common} --image_dir data --output_dir {tmp_path}/out",
        "main_metrics": f"--images data {quick_inception.flag} --num_workers 0",
    }.items():
        assert re.search(r"images.* is 16 .*in process 0, but 15 .*in process 1 on host1", ended(script, command))
