"""experiments/run.py as a process: interrupted, resumed, with a row that fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_images

TINY = Path(__file__).with_name("tiny.yaml")


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """Start ``experiments/run.py`` on the images of ``folder``, in its own session."""
    command = ["small", "--scale", "tiny", "--experiments", TINY, "--device", "cpu"]
    command += ["--data_path", folder / "images", "--output_dir", folder / "out"]
    command += ["--results", folder / "results", *flags]
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
    """Return the results of a run by name."""
    paths = (folder / "results" / "tiny").glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, exit status, standard output and standard error."""
    folder = tmp_path_factory.mktemp("whole")
    images = write_images(folder / "images", each=8)
    shutil.copytree(images / "train", images / "val")
    run = start(folder, "--jobs", "2")
    out, err = run.communicate()
    return folder, run.returncode, out, err


@pytest.mark.slow
def test_other_rows_continue_after_a_failure(whole):
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
def test_results_have_metrics_commands_and_device(whole):
    folder, _, out, _ = whole
    result = results(folder)["ar-plain-seed0"]
    images = result["images"]
    assert [*images] == ["1", "2"] and images["1"]["count"] == 12
    names = {"frechet", "precision", "recall", "density", "coverage"}
    assert names == {*images["2"]["features"]}
    assert result["nats"] > 0 and result["training_seconds"] > 0 and "psnr_db" not in result
    assert result["commands"][-1].startswith("python -m experiments.measures")
    assert result["device"].startswith("CPU")
    assert results(folder)["reconstruction-continuous-seed0"]["psnr_db"] > 0
    assert not [*(folder / "out").rglob("samples*/*.png")]  # only the grid is kept
    (line,) = [line for line in out.splitlines() if line.startswith("| autoregressive again")]
    assert line.split(" | ")[1:3] == ["2", "0"]
    assert f"{images['2']['pixels']['frechet']:.1f} (-)" in line


def interrupt(whole: tuple, folder: Path, sent: signal.Signals) -> Path:
    """Interrupt a run while it trains, check that all processes end, return the training's record."""
    shutil.copytree(whole[0] / "images", folder / "images")
    stopped = start(folder)
    seed_dir = folder / "out" / "tiny" / "seed0"
    while not (seed_dir / "ar" / "checkpoint-last.pth").exists():
        assert stopped.poll() is None, stopped.stderr.read()
        time.sleep(0.05)
    # Ctrl-C reaches every process; kill reaches only the runner.
    (os.killpg if sent == signal.SIGINT else os.kill)(stopped.pid, sent)
    assert "interrupted" in stopped.communicate()[1] and stopped.returncode == 130
    with pytest.raises(ProcessLookupError):  # all processes of the session end
        for _ in range(600):
            os.killpg(stopped.pid, 0)
            time.sleep(0.05)
    record = seed_dir.parent / "steps" / "seed0-ar-training.json"
    assert not json.loads(record.read_text())["finished"]
    return record


@pytest.mark.slow
def test_kill_ends_all_processes(whole, tmp_path):
    interrupt(whole, tmp_path, signal.SIGTERM)


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_results(whole, tmp_path):
    record = interrupt(whole, tmp_path, signal.SIGINT)
    tokenizer = tmp_path / "out" / "tiny" / "seed0" / "tokenizers" / "plain" / "vae.ckpt"
    saved = tokenizer.stat().st_mtime_ns

    resumed = start(tmp_path)
    out, _ = resumed.communicate()
    assert resumed.returncode == 1 and "seed0/tokenizers/plain:" not in out
    assert tokenizer.stat().st_mtime_ns == saved
    assert "resume" in record.with_suffix(".log").read_text().lower()
    assert {*results(tmp_path)} == {*results(whole[0])}
    for name, result in results(tmp_path).items():
        expected = results(whole[0])[name]
        assert result.keys() == expected.keys() and result["images"] == expected["images"], name
        assert result.get("nats") == expected.get("nats")


@pytest.mark.slow
def test_existing_results_are_not_run_again(whole):
    folder = whole[0]
    paths = [path for path in folder.rglob("*.json") if "broken" not in path.name]
    before = {path: path.stat().st_mtime_ns for path in paths}
    second = start(folder)
    out, err = second.communicate()
    assert second.returncode == 1 and err.count("failed: ") == 3
    assert "/" not in out.split("A small table")[0]
    assert {path: path.stat().st_mtime_ns for path in paths} == before


@pytest.mark.slow
def test_measured_results_are_written_to_another_folder_without_running_again(whole):
    folder = whole[0]
    out, _ = start(folder, "--jobs", "2", "--results", str(folder / "other")).communicate()
    assert "/" not in out.split("A small table")[0]
    for name, result in results(folder).items():
        other = folder / "other" / "tiny" / f"{name}.json"
        assert json.loads(other.read_text()) == result
