"""Caching, training and measuring on three machines, which get slow, die and are cut off. Namespaces stand for them."""

import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from engine_tokenbridge import Trainer
from models.vae import AutoencoderKL
from tests.conftest import filled, load, write_images
from tests.scripts.conftest import BASE
from tests.scripts.hosts import Cluster
from util import distributed
from util.checkpoint.vae_files import save_vae
from util.training_state import TrainingState

LOST = "another rank of this run has ended"
SECONDS = 15  # of a step, until the others are thought lost


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that all nodes share; in it ``local``, which each has its own of."""
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def cluster(site):
    """Three nodes."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        pytest.skip("machines of namespaces need root and the packages util-linux and iproute2")
    with ExitStack() as stack:
        (site / "nodes").mkdir()
        try:
            cluster = Cluster(stack, 3, site / "nodes", site / "local")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this system makes no machines of namespaces: {error}")
        yield cluster


@pytest.fixture(scope="module")
def training(cluster, site) -> str:
    """A training's command, on a cache that the nodes have made; 24 steps."""
    write_images(site / "data")
    save_vae(site / "vae.ckpt", filled(AutoencoderKL(8, (1, 1, 2), ch=8, num_res_blocks=1)), 0.5)
    command = f"main_cache.py --img_size 16 --vae_path {site}/vae.ckpt --data_path {site}/data --device cpu"
    command += f" --cached_path {site}/cache --batch_size 3 --num_workers 0"
    assert cluster.finish(cluster.start_all(command)) == [0, 0, 0]
    flags = "--batch_size 1 --epochs 4 --save_every_steps 2 --use_cached"
    return f"main_tokenbridge.py {BASE} {flags} --cached_path {site}/cache"


@pytest.fixture(scope="module")
def unbroken(cluster, site, training) -> Path:
    """The folder of a run that nothing happened to."""
    assert cluster.finish(cluster.start_all(f"{training} --output_dir {site}/unbroken")) == [
        0,
        0,
        0,
    ]
    return site / "unbroken"


def steps_saved(folder: Path) -> int:
    """Steps of a run until its last checkpoint."""
    if not (folder / "checkpoint-last.pth").exists():
        return 0
    content = load(folder)
    return (content["epoch"] + 1) * content["steps_per_epoch"] + content["step"]


def assert_same_end(ours: Path, unbroken: Path) -> None:
    """Weights, their average and the optimizer are equal, bit for bit."""
    ours, unbroken = load(ours), load(unbroken)
    for part in ("model", "model_ema"):
        assert all(torch.equal(value, unbroken[part][name]) for name, value in ours[part].items())
    for number, entry in ours["optimizer"]["state"].items():
        assert all(
            torch.equal(value, unbroken["optimizer"]["state"][number][name])
            for name, value in entry.items()
        )


@pytest.mark.slow
def test_three_machines_sample_and_measure_what_they_trained(
    cluster, site, unbroken, inception, fid_stats
):
    command = f"main_tokenbridge.py {BASE} --vae_path {site}/vae.ckpt --resume {unbroken} --output_dir {site}/out"
    command += " --evaluate --num_images 12 --eval_bsz 4 --num_iter 2 --no_metrics"
    assert cluster.finish(cluster.start_all(command)) == [0, 0, 0]
    assert len(list((site / "out" / "samples").glob("0*.png"))) == 12
    command = f"main_metrics.py --images {site}/out/samples --fid_stats {fid_stats[0]} --device cpu --num_workers 0"
    command += f" --batch_size 4 --inception_weights {inception} --json {site}/figures.json"
    assert cluster.finish(cluster.start_all(command)) == [0, 0, 0]
    assert '"images": 12' in (site / "figures.json").read_text()


@pytest.mark.slow
def test_a_slow_machine_is_waited_for_and_a_dead_one_joins_again(cluster, site, training, unbroken):
    # Each node has a folder of its own: the main process alone has checkpoints.
    command, here = (
        f"{training} --output_dir {site}/local --resume {site}/local",
        cluster.folder / "node0",
    )
    slow, dead = cluster.nodes[1:]
    slow.slow_down()
    launchers = cluster.start_all(command)
    cluster.wait(lambda: steps_saved(here) >= 4)
    dead.kill()
    # One notices, and the launchers end the other; where the slow one's last packets are lost, that one hears nothing.
    cluster.wait(lambda: LOST in cluster.said(cluster.nodes[0]) + cluster.said(slow))
    slow.speed_up()
    launchers[2] = cluster.start(dead, command)
    assert cluster.finish(launchers) == [0, 0, 0]
    assert "resumed from" in cluster.said(cluster.nodes[0])
    assert_same_end(here, unbroken)


@pytest.mark.slow
def test_the_loss_of_a_machine_that_is_cut_off_is_noticed_and_it_comes_back(
    cluster, site, training, unbroken
):
    slow, lost = cluster.nodes[1:]
    slow.slow_down()
    launchers = cluster.start_all(
        f"tests/scripts/impatient.py {SECONDS} {training} --output_dir {site}/cut --resume {site}/cut"
    )
    cluster.wait(lambda: steps_saved(site / "cut") >= 4)
    cluster.cut_off(lost)
    cluster.wait(lambda: LOST in cluster.said(cluster.nodes[0]) and LOST in cluster.said(slow))
    slow.speed_up()
    cluster.plug_in(lost)
    assert cluster.finish(launchers) == [0, 0, 0]
    assert LOST in cluster.said(lost)
    assert_same_end(site / "cut", unbroken)


@pytest.mark.slow
def test_folders_of_samples_that_are_not_shared_end_the_run_at_once(cluster, site, unbroken):
    command = f"tests/scripts/impatient.py {SECONDS} main_tokenbridge.py {BASE} --vae_path {site}/vae.ckpt"
    command += f" --resume {unbroken} --output_dir {site}/local --evaluate --num_images 12 --num_iter 2 --no_metrics"
    assert 0 not in cluster.finish(cluster.start_all(command, restarts=0))
    said = "".join(cluster.said(node) for node in cluster.nodes)
    assert said.count(f"error: {site}/local must be on a disk that all machines share") == 1
    assert not list(site.glob("nodes/*/samples/0*.png"))


def test_a_step_waits_less_for_others_than_a_checkpoint(
    run_two, cached, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(distributed, "STEP_TIMEOUT", timedelta(seconds=1))
    command = f"{BASE} --epochs 1 --batch_size 2 --use_cached --cached_path {cached} --output_dir"
    save, take_step = TrainingState.save, Trainer.clip_and_step

    def save_slowly(state):
        time.sleep(2.5 * distributed.is_main_process())
        save(state)

    monkeypatch.setattr(TrainingState, "save", save_slowly)
    run_two("main_tokenbridge", f"{command} {tmp_path}/saved --save_every_steps 2")  # of 4 steps

    def step_slowly(trainer, loss, lr):
        time.sleep(2.5 * (distributed.get_rank() == 1 and trainer.state.step == 2))
        take_step(trainer, loss, lr)

    monkeypatch.setattr(Trainer, "clip_and_step", step_slowly)
    run_two("main_tokenbridge", f"{command} {tmp_path}/lost", status=1)
    assert LOST in capfd.readouterr().err
