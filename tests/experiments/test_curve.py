"""Training curves: means of epochs, and the stored curve of a run."""

import json

import pytest

from tests.conftest import TINY, scalars
from util.metrics.run_log import epoch_means


def test_losses_are_averaged_over_the_steps_of_each_epoch():
    # Means of steps 1 to 2, 3, 4 to 5, 6 and 7: the third epoch is incomplete.
    losses = {2: 5.0, 3: 2.0, 5: 1.0, 6: 4.0, 7: 9.0}
    assert epoch_means(losses, 3) == pytest.approx([4.0, 2.0])


def test_the_curve_of_a_run_is_stored(run, refused, cached, tmp_path):
    common = f"{TINY} --quant_bits 3 --use_cached --cached_path {cached} --batch_size 8 --epochs 3"
    nll = f"--online_nll --eval_freq 2 --cached_val_path {cached}"
    run("main_tokenbridge", f"{common} {nll} --output_dir {tmp_path}/run")
    run("experiments.curve", f"--run {tmp_path}/run --title mine --json {tmp_path}/curve.json")
    curve = json.loads((tmp_path / "curve.json").read_text())
    losses = scalars(tmp_path / "run", "train/loss")
    assert curve["loss"] == pytest.approx(list(losses.values())) and len(curve["loss"]) == 3
    assert {*curve["nats"]} == {"2", "3"} and curve["title"] == "mine"
    assert curve["uniform_loss"] == pytest.approx(2.0794, abs=1e-4)
    line = refused("experiments.curve", f"--run {tmp_path}/none --json {tmp_path}/c.json")
    assert "none" in line
