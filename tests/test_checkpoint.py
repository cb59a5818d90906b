"""Checkpoints in the published layout and in ours, and what is refused."""

import argparse
import os
import pickle
import random
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import SMALL, filled
from tests.fill import deterministic_fill
from tools import checkpoint as commands
from util import checkpoint
from util.checkpoint.load import load_optimizer, load_weights
from util.config import check_config
from util.errors import UserError
from util.misc import add_weight_decay


def released(model: TokenBridge) -> dict:
    """What the release's training script writes, an optimizer after one step included."""
    optimizer = torch.optim.AdamW(add_weight_decay(model, 0.02), lr=1e-3, betas=(0.9, 0.95))
    model(torch.randn(2, 16, 4, 4), torch.tensor([0, 1])).backward()
    optimizer.step()
    learned = dict(model.named_parameters())
    return {
        "model": model.state_dict(),
        "model_ema": {name: 2 * value.detach() for name, value in learned.items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="tokenbridge_large", blr=5e-5, device="cuda"),
    }


def test_published_checkpoints_load(tmp_path, small_model):
    path = tmp_path / "checkpoint-last.pth"
    torch.save(released(small_model.train()), path)
    content = checkpoint.read(checkpoint.find(tmp_path))
    assert content["epoch"] == 3 and content["args"].blr == 5e-5
    model, ema = TokenBridge(**SMALL), TokenBridge(**SMALL)
    load_weights(model, content, path, ema=False)
    load_weights(ema, content, path, ema=True)
    for name, value in small_model.named_parameters():
        assert torch.equal(model.state_dict()[name], value) and torch.equal(ema.state_dict()[name], 2 * value)
    assert torch.equal(ema.state_dict()["boundaries"], small_model.state_dict()["boundaries"])


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, save):
    path, trace = tmp_path / "checkpoint-last.pth", tmp_path / "trace"
    save({"model": Trap(trace)}, path)
    with pytest.raises(UserError, match="not loaded"):
        checkpoint.read(path)
    assert not trace.exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    with pytest.raises(UserError, match=r"no checkpoint-last\.pth in"):
        checkpoint.find(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.read(path)
    torch.save({"model": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(UserError, match="holds a Tensor"):
        checkpoint.read(path)
    with pytest.raises(UserError, match="no weights under 'model_ema'"):
        load_weights(TokenBridge(**SMALL), {"model": {}}, path, ema=True)


def test_weights_of_another_shape_are_listed_with_the_flags_to_check(small_model):
    state = deterministic_fill(filled(TokenBridge(**{**SMALL, "quant_levels": 8})).state_dict())
    state.pop("mask_token")
    state["stranger"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        load_weights(small_model, {"model": state}, "file.pth", ema=False)
    for part in (
        "missing: mask_token.",
        "reconstruction_values [8] (expected [16])",
        "unexpected: stranger",
        "--quant_bits",
    ):
        assert part.rstrip(".") in str(error.value)


def test_averages_come_with_the_files_own_tables(small_model):
    other = filled(TokenBridge(**SMALL, std_range=2.0))
    content = {"model": other.state_dict(), "model_ema": {n: p.detach() for n, p in other.named_parameters()}}
    load_weights(small_model, content, "file.pth", ema=True)
    assert torch.equal(small_model.quantizer.thresholds, other.quantizer.thresholds)


def test_a_file_that_tells_nothing_is_taken_for_a_published_one(small_model, caplog):
    check_config({}, {**small_model.config, "latent_factor": 0.2325}, "published.pth")
    assert not caplog.text
    check_config({}, {**TokenBridge(**SMALL, quant_max=4.0).config, "latent_factor": 0.5}, "file.pth")
    assert "quant_max 5.0, not 4.0" in caplog.text and "latent_factor 0.2325, not 0.5" in caplog.text


def test_a_config_that_differs_is_named_on_both_sides(small_model):
    config = {**small_model.config, "latent_factor": 0.3}
    check_config({}, {**small_model.config, "latent_factor": 0.2325}, "published.pth")
    check_config(config, {**small_model.config, "latent_factor": 0.3}, "file.pth")
    with pytest.raises(UserError, match=r"quant_max is 4.0 there, 5.0 here \(--quant_max\)"):
        check_config({**config, "quant_max": 4.0}, {**small_model.config, "latent_factor": 0.3}, "file.pth")
    with pytest.raises(UserError, match=r"latent_factor is 0.3 there, 0.2325 here"):
        check_config(config, {**small_model.config, "latent_factor": 0.2325}, "file.pth")


def test_step_counts_go_where_this_runs_optimizer_wants_them(small_model, tmp_path):
    state = released(small_model.train())["optimizer"]  # of an optimizer that is not fused, as the release's
    with torch.device("meta"):  # as a CUDA device: another one than the file's
        model = TokenBridge(**SMALL)
    optimizer = torch.optim.AdamW(add_weight_decay(model, 0.02), lr=1e-3, betas=(0.9, 0.95), fused=True)
    before = torch.optim.Optimizer.load_state_dict
    seen = []

    def load_state_dict(self, content):
        before(self, content)
        seen.extend(str(entry["step"].device) for entry in self.state.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "load_state_dict", load_state_dict)
        load_optimizer(optimizer, state, "file.pth")
    assert set(seen) == {"meta"}


# --------------------------------------------------------------------------------------------------------------------
# Safetensors.


def same(a, b) -> bool:
    """Whether two nested values are equal, types included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def test_checkpoints_become_safetensors_and_come_back_without_loss(tmp_path, small_model, capsys):
    paths = [tmp_path / name for name in ("a.pth", "b.safetensors", "c.pth")]
    content = released(small_model.train())
    content |= {
        "config": {**small_model.config, "latent_factor": 0.2325},
        "more": (1, [2.5, None], {"a.b": True, 3: "x"}),
    }
    content |= {"half": torch.ones(3, dtype=torch.bfloat16), "a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.zeros(1)}}
    content["shared"] = [content["half"], content["half"][1:]]
    torch.save(content, paths[0])
    for source, target in pairwise(paths):
        commands.main(["convert", str(source), str(target)])
    before, after = (checkpoint.read(paths[i]) for i in (0, 2))
    assert same({**before, "args": vars(before["args"])}, {**after, "args": vars(after["args"])})
    assert list(after["model"]) == list(small_model.state_dict())

    commands.main(["show", str(paths[1])])
    shown = capsys.readouterr().out
    assert "model: " in shown and "epoch: 3" in shown and "quant_levels: 16" in shown and "0.2325" in shown
    commands.main(["show", str(paths[1]), "--tensors"])
    assert "mask_token [1, 1, 32] torch.float32" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_averages_alone_take_the_weights_place(tmp_path, small_model, suffix):
    torch.save(released(small_model.train()), tmp_path / "a.pth")
    folder = tmp_path / "alone"
    folder.mkdir()
    commands.convert(tmp_path / "a.pth", folder / f"checkpoint-last.{suffix}", "model_ema")
    path = checkpoint.find(folder)
    content = checkpoint.read_run(path)
    model = TokenBridge(**SMALL)
    load_weights(model, content, path, ema=True)
    for name, value in small_model.named_parameters():
        assert torch.equal(model.state_dict()[name], 2 * value)
    assert torch.equal(model.quantizer.thresholds, small_model.quantizer.thresholds)


def test_damaged_safetensors_are_refused(tmp_path, small_model):
    path = tmp_path / "checkpoint-last.safetensors"
    content = {"model": small_model.state_dict()}
    checkpoint.safetensors_io.write(path, content)
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged[: draw.choice([len(whole), draw.randrange(len(whole))])])
        try:
            assert same(dict(checkpoint.read(path)["model"]), dict(content["model"]))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 30


def test_what_cannot_be_converted_is_named(tmp_path, small_model):
    path = tmp_path / "a.pth"
    torch.save({"model": small_model.state_dict(), "what": {1, 2}}, path)
    for target, weights, message in (
        ("b.zip", None, "choose a name"),
        ("a.pth", None, "is there already"),
        ("b.safetensors", "model_ema", "no weights under 'model_ema'"),
        ("b.safetensors", None, "what is a set"),
    ):
        with pytest.raises(UserError, match=message):
            commands.convert(path, tmp_path / target, weights)
    assert [each.name for each in tmp_path.iterdir()] == ["a.pth"]


def test_tokenizers_of_any_program_as_safetensors(tmp_path):
    vae = filled(AutoencoderKL(16, (1, 1, 2, 2, 4)))
    save_file(vae.state_dict(), tmp_path / "kl16.safetensors")  # nothing but tensors: taken for KL-16
    loaded, latent_factor = AutoencoderKL.from_pretrained(tmp_path / "kl16.safetensors")
    assert latent_factor == 0.2325 and torch.equal(loaded.quant_conv.weight, vae.quant_conv.weight)
    small = filled(AutoencoderKL(4, (1, 2), ch=32, num_res_blocks=1))
    checkpoint.save_vae(tmp_path / "vae.ckpt", small, 0.7)
    commands.convert(tmp_path / "vae.ckpt", tmp_path / "vae.safetensors")
    loaded, latent_factor = AutoencoderKL.from_pretrained(tmp_path / "vae.safetensors")
    assert latent_factor == 0.7 and loaded.config == small.config
