"""Checkpoints in the published layout and in ours, and what is refused."""

import argparse
import os
import pickle

import pytest
import torch

from models.tokenbridge import TokenBridge
from tests.conftest import SMALL, filled
from tests.fill import deterministic_fill
from util import checkpoint
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
    checkpoint.load_weights(model, content, path, ema=False)
    checkpoint.load_weights(ema, content, path, ema=True)
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
        checkpoint.load_weights(TokenBridge(**SMALL), {"model": {}}, path, ema=True)


def test_weights_of_another_shape_are_listed_with_the_flags_to_check(small_model):
    state = deterministic_fill(filled(TokenBridge(**{**SMALL, "quant_levels": 8})).state_dict())
    state.pop("mask_token")
    state["stranger"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        checkpoint.load_weights(small_model, {"model": state}, "file.pth", ema=False)
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
    checkpoint.load_weights(small_model, content, "file.pth", ema=True)
    assert torch.equal(small_model.quantizer.thresholds, other.quantizer.thresholds)


def test_a_file_that_tells_nothing_is_taken_for_a_published_one(small_model, caplog):
    checkpoint.check_config({}, small_model, 0.2325, "published.pth")
    assert not caplog.text
    checkpoint.check_config({}, TokenBridge(**SMALL, quant_max=4.0), 0.5, "file.pth")
    assert "quant_max 5.0, not 4.0" in caplog.text and "latent_factor 0.2325, not 0.5" in caplog.text


def test_a_config_that_differs_is_named_on_both_sides(small_model):
    config = {**small_model.config, "latent_factor": 0.3}
    checkpoint.check_config({}, small_model, 0.2325, "published.pth")
    checkpoint.check_config(config, small_model, 0.3, "file.pth")
    with pytest.raises(UserError, match=r"quant_max is 4.0 there, 5.0 here \(--quant_max\)"):
        checkpoint.check_config({**config, "quant_max": 4.0}, small_model, 0.3, "file.pth")
    with pytest.raises(UserError, match=r"latent_factor is 0.3 there, 0.2325 here"):
        checkpoint.check_config(config, small_model, 0.2325, "file.pth")
