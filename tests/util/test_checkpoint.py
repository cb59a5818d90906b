"""Checkpoints read and loaded: the published layout, ours, safetensors, and what is refused."""

import argparse
import os
import pickle
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import (
    SMALL,
    filled,
    published_parameters,
    published_state,
    released,
    same,
    same_states,
)
from tests.fill import deterministic_fill
from tools import checkpoint as commands
from util.checkpoint import safetensors_io
from util.checkpoint.files import (
    file_stamp,
    older_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from util.checkpoint.load import load_weights, warn_if_ema_is_untrained
from util.checkpoint.runs import find_checkpoint, read_newest_checkpoint, read_run
from util.checkpoint.vae_files import save_vae
from util.checksums import fingerprint
from util.errors import UserError


def test_published_checkpoints_load(tmp_path, small_model):
    path = tmp_path / "checkpoint-last.pth"
    torch.save(released(small_model.train()), path)
    content = read_checkpoint(find_checkpoint(tmp_path))
    assert content["epoch"] == 3 and content["args"].blr == 5e-5
    model, ema = TokenBridge(**SMALL), TokenBridge(**SMALL)
    load_weights(model, content, path, ema=False)
    load_weights(ema, content, path, ema=True)
    for name, value in small_model.named_parameters():
        assert torch.equal(model.state_dict()[name], value) and torch.equal(
            ema.state_dict()[name], 2 * value
        )
    assert torch.equal(ema.quantizer.boundaries, small_model.quantizer.boundaries)


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, save):
    path, trace = tmp_path / "checkpoint-last.pth", tmp_path / "trace"
    save({"model": Trap(trace)}, path)
    with pytest.raises(UserError, match="not loaded"):
        read_checkpoint(path)
    assert not trace.exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    with pytest.raises(UserError, match=r"no checkpoint-last\.pth in"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at"):
        read_checkpoint(path)
    torch.save({"model": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(UserError, match="contains a Tensor"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="no weights under 'model_ema'"):
        load_weights(TokenBridge(**SMALL), {"model": {}}, path, ema=True)


def test_numpy_values_are_named_with_the_remedy_and_never_passed_over_for_an_older_file(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    torch.save({"model": {}, "epoch": 2}, tmp_path / "checkpoint-last.1.pth")
    torch.save(
        {"model": {}, "epoch": np.int64(3), "args": argparse.Namespace(lr=np.float64(1))}, path
    )
    with pytest.raises(
        UserError, match=r"contains NumPy values \(numpy.*scalar.*\) and was not .*int\(epoch\)"
    ) as error:
        read_newest_checkpoint(path)
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_models_are_read_without_the_wrappers(
    tmp_path, small_model, prefix, caplog
):
    caplog.set_level("INFO")
    state, averages = (
        small_model.state_dict(),
        {name: 2 * p.detach() for name, p in small_model.named_parameters()},
    )
    wrapped = [
        {f"{prefix}{name}": value for name, value in each.items()} for each in (state, averages)
    ]
    torch.save({"model": wrapped[0], "model_ema": wrapped[1]}, tmp_path / "checkpoint-last.pth")
    content = read_run(tmp_path / "checkpoint-last.pth")
    assert same(dict(content["model"]), dict(state)) and same(dict(content["model_ema"]), averages)
    assert caplog.text.count("removed the prefixes module. and _orig_mod.") == 2


def test_a_tokenizer_whose_blocks_were_compiled_one_by_one_is_read_without_the_wrappers(
    tmp_path, kl16
):
    wrapper = "module._orig_mod."
    names = {name: wrapper + name.replace("mid.", f"mid.{wrapper}") for name in kl16.state_dict()}
    torch.save(
        {names[name]: value for name, value in kl16.state_dict().items()}, tmp_path / "kl16.ckpt"
    )
    assert same_states(AutoencoderKL.from_pretrained(tmp_path / "kl16.ckpt")[0], kl16)


def test_weights_of_another_shape_are_listed_with_the_flags_to_check(small_model):
    state = deterministic_fill(published_state(TokenBridge(**{**SMALL, "quant_levels": 8})))
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
    content = {"model": published_state(other), "model_ema": published_parameters(other)}
    load_weights(small_model, content, "file.pth", ema=True)
    assert torch.equal(small_model.quantizer.thresholds, other.quantizer.thresholds)


# --------------------------------------------------------------------------------------------------------------------
# Files that give way to newer ones.

NAMES = [f"checkpoint-last{age}.pth" for age in ("", ".1", ".2")]


def epochs(folder) -> list[int | None]:
    """The epochs of a folder's checkpoints, the newest first; None for files that are damaged."""
    found = []
    for name in NAMES:
        if (folder / name).exists():
            try:
                found.append(read_checkpoint(folder / name)["epoch"])
            except UserError:
                found.append(None)
    return found


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints, of epochs 2, 1 and 0."""
    for epoch in range(3):
        save_checkpoint(tmp_path / NAMES[0], {"model": {}, "epoch": epoch}, keep_last=3)
    assert epochs(tmp_path) == [2, 1, 0]
    return tmp_path


@pytest.mark.parametrize("keep_last", [1, 2, 3])
@pytest.mark.parametrize("damaged", [0, 1, 2])
@pytest.mark.parametrize("links", [True, False])
def test_a_disk_that_is_full_at_any_moment_takes_no_whole_file(
    saved, monkeypatch, keep_last, damaged, links
):
    for name in NAMES[:damaged]:
        (saved / name).write_bytes(b"damaged")
    before = [None] * damaged + [2, 1, 0][damaged:]
    _, resumed = read_newest_checkpoint(saved / NAMES[0])
    whole = file_stamp(resumed)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            save_checkpoint(saved / NAMES[0], {"model": {}, "epoch": 3}, keep_last, whole)
    assert epochs(saved) == before
    if not links:
        monkeypatch.setattr(os, "link", full)
    whole = save_checkpoint(saved / NAMES[0], {"model": {}, "epoch": 3}, keep_last, whole)
    assert epochs(saved) == [3, *[epoch for epoch in before if epoch is not None]][:keep_last]
    save_checkpoint(saved / NAMES[0], {"model": {}, "epoch": 4}, keep_last, whole)
    assert epochs(saved)[:2] == [4, 3][:keep_last] and None not in epochs(saved)
    assert {path.name for path in saved.iterdir()} <= set(NAMES)


@pytest.mark.parametrize("content", [b"damaged", None])
def test_a_file_that_the_run_does_not_know_is_kept_only_if_it_is_whole(saved, content):
    whole = save_checkpoint(saved / NAMES[0], {"model": {}, "epoch": 3}, 2)
    (saved / "new").write_bytes(content or (saved / NAMES[1]).read_bytes())  # of epoch 2
    (saved / "new").replace(saved / NAMES[0])
    save_checkpoint(saved / NAMES[0], {"model": {}, "epoch": 4}, 2, whole)
    assert epochs(saved) == [4, 2]


# --------------------------------------------------------------------------------------------------------------------
# Safetensors.


def test_damaged_safetensors_are_refused(tmp_path, small_model):
    path = tmp_path / "checkpoint-last.safetensors"
    content = {"model": small_model.state_dict()}
    safetensors_io.write(path, content)
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged[: draw.choice([len(whole), draw.randrange(len(whole))])])
        try:
            assert same(dict(read_checkpoint(path)["model"]), dict(content["model"]))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 30


def test_tokenizers_of_any_program_as_safetensors(tmp_path, kl16):
    save_file(
        kl16.state_dict(), tmp_path / "kl16.safetensors"
    )  # nothing but tensors: taken for KL-16
    loaded, latent_factor = AutoencoderKL.from_pretrained(tmp_path / "kl16.safetensors")
    assert latent_factor == 0.2325 and torch.equal(loaded.quant_conv.weight, kl16.quant_conv.weight)
    small = filled(AutoencoderKL(4, (1, 2), ch=32, num_res_blocks=1))
    save_vae(tmp_path / "vae.ckpt", small, 0.7)
    commands.convert(tmp_path / "vae.ckpt", tmp_path / "vae.safetensors")
    loaded, latent_factor = AutoencoderKL.from_pretrained(tmp_path / "vae.safetensors")
    assert latent_factor == 0.7 and loaded.config == small.config
    # Its hash is that of its weights, not of its file.
    loaded.save_pretrained(tmp_path / "vae", latent_factor)
    files = ("vae.ckpt", "vae.safetensors", "vae")
    hashes = {fingerprint(AutoencoderKL.from_pretrained(tmp_path / name)[0]) for name in files}
    assert hashes == {fingerprint(small)} and fingerprint(kl16) not in hashes


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
        warn_if_ema_is_untrained(content, "file.pth")
    assert (
        "only 40 steps" in caplog.text and "--no_ema" in caplog.text and "--resume" in caplog.text
    ) == warned


def test_a_log_beside_a_folder_is_no_earlier_checkpoint(tmp_path):
    for name in ("x.log", "12.log", "checkpoint-last.2.pth", "checkpoint-last.old.pth"):
        (tmp_path / name).touch()
    assert older_checkpoints(tmp_path / "x") == older_checkpoints(tmp_path / "12") == []
    expected = [tmp_path / "checkpoint-last.2.pth"]
    assert older_checkpoints(tmp_path / "checkpoint-last.pth") == expected
