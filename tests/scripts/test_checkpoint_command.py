"""python -m tools.checkpoint: show, convert and export."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import OWN, SMALL, TINY, described, published_state, released, same, same_states
from tests.hub_server import COMMIT
from tools import checkpoint as commands
from util.checkpoint.files import read_checkpoint
from util.checkpoint.load import load_weights
from util.checkpoint.runs import find_checkpoint, read_run
from util.errors import UserError

# --------------------------------------------------------------------------------------------------------------------
# Show and convert.


def test_checkpoints_become_safetensors_and_come_back_without_loss(tmp_path, small_model, capsys):
    paths = [tmp_path / name for name in ("a.pth", "b.safetensors", "c.pth")]
    content = released(small_model.train())
    content |= {
        "config": {**small_model.config, "latent_factor": 0.2325},
        "more": (1, [2.5, None], {"a.b": True, 3: "x"}),
    }
    content |= {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "a": {"b.c": torch.ones(1)},
        "a.b": {"c": torch.zeros(1)},
    }
    content["shared"] = [content["half"], content["half"][1:]]
    torch.save(content, paths[0])
    for source, target in pairwise(paths):
        commands.main(["convert", str(source), str(target)])
    before, after = (read_checkpoint(paths[i]) for i in (0, 2))
    assert same({**before, "args": vars(before["args"])}, {**after, "args": vars(after["args"])})
    assert list(after["model"]) == list(published_state(small_model))

    commands.main(["show", str(paths[1])])
    shown = capsys.readouterr().out
    assert (
        "model: " in shown
        and "epoch: 3" in shown
        and "quant_levels: 16" in shown
        and "0.2325" in shown
    )
    commands.main(["show", str(paths[1]), "--tensors"])
    assert "mask_token [1, 1, 32] torch.float32" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_averages_alone_take_the_weights_place(tmp_path, small_model, suffix):
    torch.save(released(small_model.train()), tmp_path / "a.pth")
    folder = tmp_path / "alone"
    folder.mkdir()
    commands.convert(tmp_path / "a.pth", folder / f"checkpoint-last.{suffix}", "model_ema")
    path = find_checkpoint(folder)
    content = read_run(path)
    model = TokenBridge(**SMALL)
    load_weights(model, content, path, ema=True)
    for name, value in small_model.named_parameters():
        assert torch.equal(model.state_dict()[name], 2 * value)
    assert torch.equal(model.quantizer.thresholds, small_model.quantizer.thresholds)


def test_what_cannot_be_converted_is_named(tmp_path, small_model):
    path = tmp_path / "a.pth"
    torch.save({"model": small_model.state_dict(), "what": {1, 2}}, path)
    for target, weights, message in (
        ("b.zip", None, "choose a name"),
        ("a.pth", None, "exists already"),
        ("b.safetensors", "model_ema", "no weights under 'model_ema'"),
        ("b.safetensors", None, "what is a set"),
    ):
        with pytest.raises(UserError, match=message):
            commands.convert(path, tmp_path / target, weights)
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]


# --------------------------------------------------------------------------------------------------------------------
# Export.


def test_a_run_exports_and_its_export_is_a_checkpoint_again(
    run, trained, vae_path, images, tmp_path
):
    figures = tmp_path / "samples.json"
    figures.write_text(json.dumps({"frechet_inception_distance": 12.5}))
    commands.main(
        [
            "export",
            str(trained),
            f"{tmp_path}/model",
            "--figures",
            str(figures),
            "--licence",
            "cc0-1.0",
        ]
    )
    content = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in content["model_ema"].items())
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == content["config"]
    assert "12.5" in (tmp_path / "model" / "README.md").read_text()
    commands.main(["export", str(vae_path), f"{tmp_path}/vae"])
    assert (
        AutoencoderKL.from_pretrained(tmp_path / "vae")[1]
        == AutoencoderKL.from_pretrained(vae_path)[1]
    )
    common = f"{TINY} --evaluate --no_metrics --num_images 4 --num_iter 3 --eval_bsz 4 --device cpu --keep_images"
    run(
        "main_tokenbridge",
        f"{common} --resume {trained} --vae_path {vae_path} --output_dir {tmp_path}/a",
    )
    exported = f"--resume {tmp_path}/model --vae_path {tmp_path}/vae"
    run("main_tokenbridge", f"{common} {exported} --output_dir {tmp_path}/b")
    for number in range(4):
        name = f"samples/{number:05d}.png"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        commands.main(["export", str(trained), f"{tmp_path}/model"])
    # Everybody may read them, as far as everybody may read what is made here.
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(set(modes.values())) == 1 and modes["config.json"] == figures.stat().st_mode & 0o777


def test_evaluation_and_show_know_sizes_from_the_export_alone(
    run, trained, vae_path, tmp_path, capsys, caplog
):
    commands.main(["export", str(trained), f"{tmp_path}/model"])
    capsys.readouterr()
    commands.main(["show", f"{tmp_path}/model"])
    assert "class_num: 4" in capsys.readouterr().out
    common = "--evaluate --no_metrics --num_images 4 --num_iter 3 --eval_bsz 4 --device cpu --num_workers 0 --keep_images"
    run(
        "main_tokenbridge",
        f"{common} --resume {tmp_path}/model --vae_path {vae_path} --output_dir {tmp_path}/a",
    )
    assert "--model tokenbridge_tiny, from the checkpoint" in caplog.text
    run(
        "main_tokenbridge",
        f"{TINY} {common} --resume {trained} --vae_path {vae_path} --output_dir {tmp_path}/b",
    )
    assert (tmp_path / "a/samples/00002.png").read_bytes() == (
        tmp_path / "b/samples/00002.png"
    ).read_bytes()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("{run} {tmp}/x --figures {tmp}/empty.json", "holds no metrics"),
        (
            "{vae} {tmp}/x --licence mit",
            "is a tokenizer, which has no model card: remove --figures, --licence and --tokenizer",
        ),
        ("{tmp}/nowhere {tmp}/x", "no checkpoint at"),
    ],
)
def test_exports_that_cannot_be_say_why(trained, vae_path, tmp_path, arguments, says):
    (tmp_path / "empty.json").write_text("{}")
    typed = arguments.format(run=trained, vae=vae_path, tmp=tmp_path)
    with pytest.raises(UserError, match=says):
        commands.main(["export", *typed.split()])
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_goes_to_the_hub_by_the_export_command(
    served, vae_path, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    commands.main(["export", str(vae_path), f"{tmp_path}/vae", "--push_to_hub", OWN])
    assert COMMIT in capsys.readouterr().out
    vae, factor = AutoencoderKL.from_pretrained(f"hf://{OWN}")
    expected, expected_factor = AutoencoderKL.from_pretrained(vae_path)
    assert same_states(vae, expected) and factor == expected_factor


def test_a_public_repository_is_not_taken_for_a_private_one(served, trained, monkeypatch, tmp_path):
    served.add(OWN, {"README.md": b"mine"})
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(UserError, match="already exists and is public"):
        commands.main(
            ["export", str(trained), f"{tmp_path}/model", "--push_to_hub", OWN, "--private"]
        )
    with pytest.raises(UserError, match="already exists and is public"):
        described().push_to_hub(OWN, private=True)
    assert set(served.repos[OWN]) == {"README.md"} and not (tmp_path / "model").exists()
