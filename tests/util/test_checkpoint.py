"""Checkpoints read and loaded: the published layout, ours, safetensors, and what is refused."""

import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import SMALL, filled, released, same
from tests.fill import deterministic_fill
from tools import checkpoint as commands
from util import checkpoint
from util.checkpoint.load import load_weights, warn_of_young_average
from util.errors import UserError


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


# --------------------------------------------------------------------------------------------------------------------
# Safetensors.


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


@pytest.mark.parametrize(
    ("entries", "warned"),
    [
        ({}, True),
        ({"average_steps": 40}, False),
        ({"average_steps": 40, "ema_warmup": True}, False),
        ({"average_steps": 40, "ema_warmup": False}, True),
        ({"epoch": 2999}, False),
    ],
)
def test_an_average_that_is_mostly_of_drawn_weights_is_told(caplog, entries, warned):
    # An earlier version did not warm the average up, and did not count its steps.
    content = {"epoch": 3, "steps_per_epoch": 10, "args": {"ema_rate": 0.9999}, **entries}
    with caplog.at_level("WARNING", logger="tokenbridge"):
        warn_of_young_average(content, "file.pth")
    assert ("40 steps only" in caplog.text and "--no_ema" in caplog.text and "--resume" in caplog.text) == warned
