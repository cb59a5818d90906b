"""--head masked as a user types it: training and its continuation, sampling, likelihood, fine-tuning, refusals."""

import json

import pytest
import torch

from tests.conftest import SHORT, TINY, load, same
from tests.scripts.conftest import BASE, pictures


@pytest.fixture
def masked(train):
    """A run of one epoch."""
    return train("masked", "--epochs 1 --head masked")


def test_a_resumed_run_ends_as_one_never_interrupted(train, tmp_path):
    flags = "--lr_schedule constant --head masked --epochs"
    whole = load(train("whole", f"{flags} 2"))
    train("part", f"{flags} 1")
    again = load(
        train("part", f"--lr_schedule constant --epochs 2 --resume {tmp_path}/part")
    )  # it tells its head
    assert again["config"]["head"] == "masked"
    for part in ("model", "model_ema", "optimizer"):
        assert same(again[part], whole[part]), part


def test_flags_of_the_head_reach_the_sampler_and_change_the_images(
    run, masked, vae_path, tmp_path, sampler
):
    common = (
        f"{BASE} --resume {masked} --evaluate --no_metrics --num_images 4 --vae_path {vae_path}"
    )
    run(
        "main_tokenbridge",
        f"{common} --head_steps 3 --head_order confidence --output_dir {tmp_path}/a",
    )
    run("main_tokenbridge", f"{common} --output_dir {tmp_path}/b")
    assert [(call["head_steps"], call["head_order"]) for call in sampler.calls] == [
        (3, "confidence"),
        (None, None),
    ]
    settings = json.loads((tmp_path / "a" / "samples.json").read_text())["settings"]
    assert (settings["head_steps"], settings["head_order"]) == (3, "confidence")
    figure = (
        f"samples --vae_path {vae_path} --resume {masked} --device cpu --output {tmp_path}/s.png"
    )
    run("tools.figures", f"{figure} --head_steps 2 --head_order frequency")
    assert (sampler.calls[-1]["head_steps"], sampler.calls[-1]["head_order"]) == (2, "frequency")


def test_images_do_not_depend_on_the_batch(run, masked, vae_path, tmp_path):
    common = f"{BASE} --resume {masked} --evaluate --no_metrics --num_images 8 --num_iter 3 --vae_path {vae_path}"
    for name, flags in {
        "a": "--eval_bsz 3",
        "b": "--eval_bsz 8",
        "c": "--eval_bsz 8 --head_steps 8",
    }.items():
        run("main_tokenbridge", f"{common} {flags} --no_ema --output_dir {tmp_path}/{name}")
    a, b, c = (pictures(tmp_path / name / "samples") for name in "abc")
    assert a == b and len(a) == 8 and b != c


def test_held_out_likelihood(run, masked, cached, tmp_path):
    measure = f"{BASE} --resume {masked} --evaluate_nll --use_cached --cached_val_path {cached} --output_dir {tmp_path}/"
    found = []
    for name, size in (("a", 3), ("b", 16)):
        run("main_tokenbridge", f"{measure}{name} --batch_size {size}")
        found.append(json.loads((tmp_path / name / "likelihood.json").read_text())["nats_per_dim"])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and 0 < found[0] < 5
    run("main_tokenbridge", f"{measure}c --head_order frequency")
    one_order = json.loads((tmp_path / "c" / "likelihood.json").read_text())["nats_per_dim"]
    assert one_order == pytest.approx(found[0], rel=0.2) and one_order != found[0]


def test_a_masked_head_starts_on_a_trained_backbone(run, cached, trained, tmp_path, caplog):
    common = f"{TINY} {SHORT} --epochs 1 --use_cached --cached_path {cached} --lr 0"
    run(
        "main_tokenbridge",
        f"{common} --head masked --finetune {trained} --output_dir {tmp_path}/tuned",
    )
    before, after = load(trained), load(tmp_path / "tuned")
    assert after["config"]["channel_depth"] == 6  # the size's, not that of the head before
    for name, value in after["model"].items():
        if name.startswith(("encoder", "decoder", "class_emb", "condition_proj")):
            assert torch.equal(value, before["model_ema"][name]), name
    assert "reinitialized: token_embeddings.weight, masked_blocks" in caplog.text
    run(
        "main_tokenbridge",
        f"{common} --head ar --finetune {tmp_path}/tuned --output_dir {tmp_path}/back",
    )
    assert load(tmp_path / "back")["config"]["channel_depth"] == 2
    # Frozen, the rest trains alone.
    frozen = f"{common} --finetune {tmp_path}/tuned --lr 1e-3 --warmup_epochs 0 --output_dir {tmp_path}/frozen --freeze"
    run("main_tokenbridge", f"{frozen} masked_blocks.* class_emb.*")
    moved = load(tmp_path / "frozen")["model"]
    for name, value in after["model_ema"].items():
        assert torch.equal(moved[name], value) == name.startswith(("masked_blocks", "class_emb")), (
            name
        )


def test_what_does_not_fit_is_refused(refused, masked, trained, cached, vae_path, tmp_path):
    evaluate = (
        f"--evaluate --no_metrics --num_images 4 --vae_path {vae_path} --output_dir {tmp_path}/x"
    )
    resume = f"--use_cached --cached_path {cached} --epochs 3 --output_dir {tmp_path}/x"
    for flags in ("--head_steps 2", "--head_order random"):
        other = f"{flags.split()[0]} only applies to --head masked. Remove it."
        assert other in refused("main_tokenbridge", f"{TINY} {evaluate} --resume {trained} {flags}")
        assert other in refused("main_tokenbridge", f"{TINY} {resume} {flags}")
        figure = f"--resume {trained} --vae_path {vae_path} --device cpu --output {tmp_path}/x.png"
        assert other in refused("tools.figures", f"samples {figure} {flags}")
    line = refused(
        "main_tokenbridge", f"{BASE} {evaluate} --resume {masked} --first_place released"
    )
    assert "--first_place only applies to --head ar. Remove it." in line
    for steps in (0, -1, 9):
        line = refused(
            "main_tokenbridge", f"{BASE} {evaluate} --resume {masked} --head_steps {steps}"
        )
        assert f"head_steps {steps}: choose 1 to 8" in line
    assert "invalid choice: 'spiral'" in refused(
        "main_tokenbridge", f"{BASE} {evaluate} --resume {masked} --head_order spiral"
    )
    for head, folder in {"ar": masked, "parallel": masked, "masked": trained}.items():
        stored = "ar" if folder == trained else "masked"
        flags = f"{TINY if folder == trained else BASE} {resume} --resume {folder} --head {head}"
        assert f"head is {stored} in the checkpoint, {head} in this run (--head)" in refused(
            "main_tokenbridge", flags
        )
    assert not (tmp_path / "x").exists()
