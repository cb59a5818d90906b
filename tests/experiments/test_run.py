"""Experiments run as a user types it: interrupted, continued, with a row that fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.run import comparable
from tests.conftest import ROOT, write_images

TINY = Path(__file__).with_name("tiny.yaml")


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """``experiments/run.py`` on the images of ``folder``, in a session of its own."""
    names = ["--data_path", folder / "images", "--output_dir", folder / "out", "--results", folder / "results"]
    command = ["small", "--scale", "tiny", "--experiments", TINY, "--device", "cpu", *names, *flags]
    return subprocess.Popen(
        [sys.executable, "experiments/run.py", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def results(folder: Path) -> dict[str, dict]:
    """The results that there are, by name."""
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results" / "tiny").glob("*.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts: its folder, status, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    images = write_images(folder / "images", each=8)
    shutil.copytree(images / "train", images / "val")
    run = start(folder, "--jobs", "2")
    out, err = run.communicate()
    return folder, run.returncode, out, err


@pytest.mark.slow
def test_a_failed_row_is_reported_and_the_others_go_on(whole):
    folder, status, _, err = whole
    assert status == 1
    failures = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert [line.split()[1] for line in failures] == [
        "seed0/broken/training",
        "seed0/broken/plain-sampling",
        "seed0/broken/plain-measuring",
    ]
    log = Path(failures[0].split("see ")[1])
    assert "error: " in (ROOT / log).read_text()
    assert "3 of " in err.splitlines()[-1]
    assert {*results(folder)} == {
        "training-images-seed0",
        "ar-plain-seed0",
        "unequal-plain-seed0",
        "reconstruction-continuous-seed0",
    }


@pytest.mark.slow
def test_results_hold_figures_and_how_they_came_about(whole):
    folder, _, out, _ = whole
    result = results(folder)["ar-plain-seed0"]
    assert [*result["images"]] == ["1", "2"] and result["images"]["1"]["count"] == 12
    assert {"frechet", "precision", "recall", "density", "coverage"} == {*result["images"]["2"]["features"]}
    assert result["nats"] > 0 and result["training_seconds"] > 0 and "psnr_db" not in result
    assert result["commands"][-1].startswith("python -m experiments.measures") and result["device"].startswith("CPU")
    assert results(folder)["reconstruction-continuous-seed0"]["psnr_db"] > 0
    assert not [*(folder / "out").rglob("samples*/*.png")]  # a grid stays
    (line,) = [line for line in out.splitlines() if line.startswith("| autoregressive again")]
    assert line.split(" | ")[1:3] == ["2", "0"] and f"{result['images']['2']['pixels']['frechet']:.1f} (-)" in line


def interrupt(whole: tuple, folder: Path, sent: signal.Signals) -> Path:
    """Interrupt a run while it trains, which must end it with all its processes; return the record of the training."""
    shutil.copytree(whole[0] / "images", folder / "images")
    stopped = start(folder)
    at = folder / "out" / "tiny" / "seed0"
    while not (at / "ar" / "checkpoint-last.pth").exists():
        assert stopped.poll() is None, stopped.stderr.read()
        time.sleep(0.05)
    # Ctrl-C reaches every process, kill the first one alone.
    (os.killpg if sent == signal.SIGINT else os.kill)(stopped.pid, sent)
    assert "interrupted" in stopped.communicate()[1] and stopped.returncode == 130
    with pytest.raises(ProcessLookupError):  # soon no process of its session is left
        for _ in range(600):
            os.killpg(stopped.pid, 0)
            time.sleep(0.05)
    record = at.parent / "steps" / "seed0-ar-training.json"
    assert not json.loads(record.read_text())["finished"]
    return record


@pytest.mark.slow
def test_kill_ends_all_processes(whole, tmp_path):
    interrupt(whole, tmp_path, signal.SIGTERM)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_results(whole, tmp_path):
    record = interrupt(whole, tmp_path, signal.SIGINT)
    at = tmp_path / "out" / "tiny" / "seed0"
    tokenizer = (at / "tokenizers" / "plain" / "vae.ckpt").stat().st_mtime_ns

    ended = start(tmp_path)
    out, _ = ended.communicate()
    assert ended.returncode == 1 and "seed0/tokenizers/plain:" not in out
    assert (at / "tokenizers" / "plain" / "vae.ckpt").stat().st_mtime_ns == tokenizer
    assert "resume" in record.with_suffix(".log").read_text().lower()
    assert {*results(tmp_path)} == {*results(whole[0])}
    for name, result in results(tmp_path).items():
        there = results(whole[0])[name]
        assert result.keys() == there.keys() and result["images"] == there["images"], name
        assert result.get("nats") == there.get("nats")


@pytest.mark.slow
def test_what_is_there_is_not_run_again(whole):
    folder = whole[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json") if "broken" not in path.name}
    again = start(folder)
    out, err = again.communicate()
    assert again.returncode == 1 and err.count("failed: ") == 3 and "/" not in out.split("A small table")[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_what_was_measured_is_written_to_other_results_without_running_again(whole):
    folder = whole[0]
    out, _ = start(folder, "--jobs", "2", "--results", str(folder / "other")).communicate()
    assert "/" not in out.split("A small table")[0]
    for name, result in results(folder).items():
        assert json.loads((folder / "other" / "tiny" / f"{name}.json").read_text()) == result


def test_commands_compare_but_for_folder_source_and_device():
    def line(folder: str, source: str, device: str, more: str = "") -> str:
        return f"python main_vae.py --source {source} --output_dir {folder}/vae --device {device} --lr 1{more}"

    expected = comparable([line("output/experiments", "data", "cpu")], "output/experiments", "data")
    for folder in ("output", str(ROOT / "x"), "o"):
        assert comparable([line(folder, "images/cifar", "cuda:1")], folder, "images/cifar") == expected
    assert comparable([line("o", "data", "cpu", more="0")], "o", "data") != expected
