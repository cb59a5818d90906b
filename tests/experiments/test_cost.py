"""experiments.cost: which settings are measured, what they cost, and when one is worse than another."""

import json

import pytest
import torch

from experiments import cost
from experiments.features import FeatureNet
from experiments.report import Setting, cost_table, measured_settings, plot_cost
from models.sampling import SamplingOptions
from models.tokenbridge import TokenBridge


def test_settings_are_measured_once_for_each_seed(
    run, refused, trained, vae_path, images, tmp_path, monkeypatch
):
    families = {
        "random order": ({}, (4, 2)),
        "guidance on the first half": ({"cfg_interval": (0.0, 0.5)}, (4,)),
    }
    monkeypatch.setattr(cost, "FAMILIES", families)
    torch.save({"net": "plain", "weights": FeatureNet(4).state_dict()}, tmp_path / "net.pt")
    model = f"--resume {trained} --vae_path {vae_path} --precision fp32 --device cpu"
    common = f"{model} --features {tmp_path}/net.pt --num_images 8 --batch_size 3 --cfg 2"
    common += f" --reference {images}/train --json {tmp_path}/cost.json"
    run("experiments.cost", f"{common} --seeds 0")
    run("experiments.cost", f"{common} --seeds 0 1")
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert [(row["family"], row["steps"], row["seed"]) for row in rows] == [
        *(("random order", 4, 0), ("random order", 2, 0)),
        *(("guidance on the first half", 4, 0), ("random order", 4, 1)),
        *(("random order", 2, 1), ("guidance on the first half", 4, 1)),
    ]
    flops = TokenBridge.from_pretrained(trained).sampling_flops(SamplingOptions(4, cfg=2.0))
    assert rows[0]["gflop"] == pytest.approx(flops / 1e9)
    assert rows[2]["gflop"] < rows[0]["gflop"] and rows[0]["frechet"] != rows[3]["frechet"]
    table = cost_table(tmp_path / "cost.json").splitlines()
    assert len(table) == 2 + 3 and "(100%)" in table[2]
    assert len(plot_cost(tmp_path / "cost.json").axes) == 2
    assert "--features is missing" in refused("experiments.cost", f"{model} --reference {images}")


def test_a_setting_is_worse_only_if_seeds_say_so():
    def setting(recognized: list[float], frechet: list[float]) -> Setting:
        return Setting("", 4, 1.0, 1.0, recognized, frechet)

    first = setting([0.80, 0.82, 0.81], [18.0, 19.0, 18.5])
    assert not setting([0.80, 0.83, 0.79], [18.4, 19.1, 18.2]).is_worse_than(first)
    assert setting([0.70, 0.71, 0.72], [18.0, 19.0, 18.5]).is_worse_than(first)
    assert setting([0.80, 0.82, 0.81], [22.0, 23.0, 22.5]).is_worse_than(first)
    assert not setting([0.90, 0.91, 0.92], [12.0, 13.0, 12.5]).is_worse_than(first)


def test_models_of_different_quality_do_not_hide_that_a_setting_is_worse(tmp_path):
    def row(model: str, steps: int, seed: int, frechet: float) -> dict:
        described = {"resume": model, "family": "random order", "steps": steps, "seed": seed}
        return {**described, "gflop": 1.0, "seconds": 1.0, "frechet": frechet, "recognized": 0.9}

    rows = [
        row(model, steps, seed, level + worse + 0.1 * seed)
        for model, level in (("one", 20.0), ("other", 80.0))
        for steps, worse in ((16, 0.0), (4, 2.0))
        for seed in range(3)
    ]
    (tmp_path / "cost.json").write_text(json.dumps({"rows": rows}))
    first, fewer = measured_settings(tmp_path / "cost.json")
    assert fewer.is_worse_than(first) and not first.is_worse_than(fewer)
    assert len(first.frechet) == 6 and max(first.frechet) == pytest.approx(50.2)
