"""Processes on two hosts that do not see the same files: both end with one line, or go on alike."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.conftest import FID, TINY
from tests.scripts.conftest import BASE
from util import distributed
from util.data import sources
from util.metrics.sample_folder import SampleFolder


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
    assert (
        "out must be on a disk that all machines share" in line
        and "(1 of 2 ranks, on host1)" in line
    )
    assert not list(tmp_path.glob("host?/out/**/*.*"))  # neither images nor checkpoints


def test_moments_that_would_lie_on_disks_of_their_own(ended, images, vae_path, tmp_path):
    command = f"--img_size 16 --vae_path {vae_path} --data_path {images} --num_workers 0"
    assert "cache must be on a disk that all" in ended(
        "main_cache", f"{command} --cached_path cache"
    )
    assert not list(tmp_path.glob("host?/cache/**/*.*"))


def test_reconstructions_that_would_lie_on_disks_of_their_own(ended, images, vae_path, tmp_path):
    command = (
        f"--img_size 16 --vae_path {vae_path} --image_dir {images} --num_workers 0 --no_metrics"
    )
    assert "out/quant_b6_r5.0_n50 must be on a disk" in ended(
        "reconstruction", f"{command} --output_dir out"
    )
    assert not list(tmp_path.glob("host?/out/*/*"))


# --------------------------------------------------------------------------------------------------------------------
# Listings that are late.


@pytest.fixture
def late(monkeypatch):
    """``late(seconds)``: how long the second process sees no image 7 once it is there."""

    def hide(seconds: float) -> None:
        first = []

        def hidden(path: Path) -> bool:
            if path.name != "00007.png" or distributed.is_main_process():
                return False
            first[:] = first or [time.monotonic()]
            return time.monotonic() < first[0] + seconds

        glob, paths_in = Path.glob, sources.paths_in
        monkeypatch.setattr(
            Path, "glob", lambda *args: (path for path in glob(*args) if not hidden(path))
        )
        monkeypatch.setattr(
            sources, "paths_in", lambda *args: [p for p in paths_in(*args) if not hidden(Path(p))]
        )

    return hide


def test_images_that_another_host_wrote_are_waited_for(
    two_hosts, evaluate, tmp_path, sampler, decoder, late
):
    late(0.1)
    two_hosts("main_tokenbridge", f"{evaluate} --no_metrics --output_dir {tmp_path}/out")


def test_and_missed_in_one_line(ended, evaluate, tmp_path, sampler, decoder, late):
    late(1000)
    line = ended("main_tokenbridge", f"{evaluate} --no_metrics --output_dir {tmp_path}/out")
    assert "1 of 8 images are missing" in line and "(1 of 2 ranks, on host1)" in line


# --------------------------------------------------------------------------------------------------------------------
# Decisions that the main process makes for all.


def test_what_a_search_has_measured_before(
    two_hosts,
    evaluate,
    tmp_path,
    sampler,
    decoder,
    quick_inception,
    fid_stats,
    measured,
    monkeypatch,
):
    results = SampleFolder.results
    monkeypatch.setattr(
        SampleFolder, "results", lambda self: results(self) if distributed.is_main_process() else {}
    )
    monkeypatch.setattr(
        "util.metrics.plots.write_search",
        lambda rows, out: (out / "rows.json").write_text(json.dumps(rows)),
    )
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
# Checkpoints of one name on disks of their own.


@pytest.mark.parametrize("case", ["copies", "older there", "newer there", "newer there, damaged"])
def test_the_newest_checkpoint_is_the_one_of_the_most_steps_whatever_the_clocks(
    two_hosts, ended, train, cached, tmp_path, monkeypatch, case
):
    monkeypatch.setattr("util.checkpoint.runs.PAUSE", 0.0)
    older = train("older", "--epochs 1")
    newer = train("newer", f"--epochs 2 --save_last_freq 1 --resume {older}")
    for host in ("host0", "host1"):
        ahead = {"older there": "host0", "copies": None}.get(case, "host1") == host
        shutil.copytree(newer if ahead else older, tmp_path / host / "run")
        os.utime(
            tmp_path / host / "run" / "checkpoint-last.pth",
            (10**9, 10**9 + 120 * (host == "host1")),
        )
    if "damaged" in case:
        (tmp_path / "host1" / "run" / "checkpoint-last.pth").write_bytes(b"damaged")
    if case == "newer there":  # by an older clock
        os.utime(tmp_path / "host1" / "run" / "checkpoint-last.pth", (10**9 - 120, 10**9 - 120))
    command = f"{BASE} --batch_size 2 --epochs 3 --use_cached --cached_path {cached} --output_dir run --resume run"
    if case == "newer there":
        assert "host1 has a newer checkpoint in run than host0" in ended(
            "main_tokenbridge", command
        )
    else:
        said = "\n".join(two_hosts("main_tokenbridge", command))
        assert f"continuing at epoch {2 if case == 'older there' else 1}, step 0" in said


# Hosts whose CPUs differ.


def test_a_run_in_bf16_on_cpus_with_and_without_its_instructions(
    ended, cached, tmp_path, instructions, monkeypatch, two_hosts
):
    instructions()  # forgets what was known
    monkeypatch.setattr(
        "util.precision.cpu_multiplies", lambda precision: distributed.is_main_process()
    )
    command = f"{TINY} --use_cached --cached_path {cached} --output_dir {tmp_path}/run --lr 1e-3 --epochs 1"
    line = ended("main_tokenbridge", f"{command} --precision bf16")
    assert (
        "the precision that --precision bf16 runs in is bf16 on rank 0, but fp32 on rank 1 on host1"
        in line
    )
    assert "pass --precision fp32" in line and not (tmp_path / "run").exists()
    two_hosts("main_tokenbridge", f"{command} --precision fp32")


# --------------------------------------------------------------------------------------------------------------------
# Files that one host lacks.


TRAIN = f"{BASE} --epochs 1 --output_dir out"
IMAGES = "--img_size 16 --num_workers 0"


@pytest.mark.parametrize(
    "script, flags, missing, line",
    [
        (
            "main_tokenbridge",
            f"{TRAIN} --use_cached --cached_path cache",
            "cache",
            "no cache at cache",
        ),
        (
            "main_tokenbridge",
            f"{TRAIN} --data_path data --vae_path vae.ckpt",
            "data",
            "no image folder at data",
        ),
        (
            "main_tokenbridge",
            f"{TRAIN} --data_path data --vae_path vae.ckpt",
            "vae.ckpt",
            "no checkpoint at vae.ckpt",
        ),
        (
            "main_cache",
            f"{IMAGES} --data_path data --vae_path vae.ckpt --cached_path new",
            "vae.ckpt",
            "vae.ckpt",
        ),
        (
            "main_vae",
            f"{IMAGES} --data_path data --output_dir out",
            "data",
            "no image folder at data",
        ),
        (
            "reconstruction",
            f"{IMAGES} --image_dir data --vae_path vae.ckpt",
            "data",
            "no image folder at data",
        ),
        (
            "reconstruction",
            f"{IMAGES} --image_dir data --vae_path vae.ckpt",
            "vae.ckpt",
            "vae.ckpt",
        ),
    ],
)
def test_inputs_that_one_host_lacks(
    ended, cached, images, vae_path, tmp_path, script, flags, missing, line
):
    for host in ("host0", "host1"):
        for path in (cached, images):
            shutil.copytree(path, tmp_path / host / path.name)
        shutil.copy(vae_path, tmp_path / host)
    (tmp_path / "host1" / missing).rename(tmp_path / "moved")
    said = ended(script, flags)
    assert line in said and said.endswith("(1 of 2 ranks, on host1)")


def test_images_to_cache_that_one_host_lacks(ended, images, vae_path, tmp_path):
    shutil.copytree(images, tmp_path / "host0" / "data")
    line = ended(
        "main_cache",
        f"{IMAGES} --data_path data --vae_path {vae_path} --cached_path {tmp_path}/new",
    )
    assert "no image folder at data" in line and line.endswith("(1 of 2 ranks, on host1)")


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
    assert "no FID statistics at gone.npz" in ended(
        "main_tokenbridge", f"{command} --fid_stats gone.npz"
    )


def test_reconstruction_without_inception_on_one_host_measures_the_rest(
    two_hosts, images, vae_path, tmp_path, quick_inception, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", ".")
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("no network"))
    )
    checkpoints = tmp_path / "host0" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (tmp_path / "inception.pth").rename(checkpoints / "weights-inception-2015-12-05-6726825d.pth")
    command = f"--img_size 16 --vae_path {vae_path} --image_dir {images} --num_workers 0 --output_dir {tmp_path}/out"
    said = two_hosts("reconstruction", command)
    (line,) = [line for line in said if "rFID and Inception Score are not measured" in line]
    assert "on host1)" in line
    assert "psnr_db" in json.loads(
        (tmp_path / "out" / "quant_b6_r5.0_n50" / "results.json").read_text()
    )


def test_other_classes_and_caches_of_another_tokenizer_on_one_host(
    two_hosts, ended, images, vae_path, cached, tmp_path
):
    for host in ("host0", "host1"):
        shutil.copytree(images, tmp_path / host / "data")
        shutil.copytree(cached, tmp_path / host / "cache")
    (tmp_path / "host1" / "data" / "train" / "class0").rename(
        tmp_path / "host1" / "data" / "train" / "zebra"
    )
    command = f"{BASE} --batch_size 2 --epochs 1 --output_dir {tmp_path}/out"
    line = ended("main_tokenbridge", f"{command} --data_path data --vae_path {vae_path}")
    assert "the list of images in train" in line and "on rank 1 on host1" in line
    about = json.loads((cached / "cache.json").read_text())
    (tmp_path / "host1" / "cache" / "cache.json").write_text(
        json.dumps(about | {"vae_sha256": "0" * 64})
    )
    line = ended("main_tokenbridge", f"{command} --use_cached --cached_path cache")
    assert (
        "the SHA-256 of the tokenizer that cached train" in line
        and "0000 on rank 1 on host1" in line
    )


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
        assert re.search(
            r"images.* is 16 .*on rank 0, but 15 .*on rank 1 on host1", ended(script, command)
        )
