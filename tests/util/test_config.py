"""What a run takes from flags, tokenizer and weights: what differs is named, what is open is adopted."""

import argparse

import pytest

from models.tokenbridge import TokenBridge, sizes_of
from tests.conftest import SMALL
from util.config import Start, TokenizerInfo, adopted_values, check_config
from util.errors import UserError
from util.model_config import FINETUNE


def test_a_file_that_tells_nothing_is_taken_for_a_published_one(small_model, caplog):
    check_config({}, {**small_model.config, "latent_factor": 0.2325}, "published.pth")
    assert not caplog.text
    check_config(
        {}, {**TokenBridge(**SMALL, quant_max=4.0).config, "latent_factor": 0.5}, "file.pth"
    )
    assert (
        "quant_max 5.0, not 4.0" in caplog.text and "latent_factor 0.2325, not 0.5" in caplog.text
    )


def test_a_config_that_differs_is_named_on_both_sides(small_model):
    config = {**small_model.config, "latent_factor": 0.3}
    check_config({}, {**small_model.config, "latent_factor": 0.2325}, "published.pth")
    check_config(config, {**small_model.config, "latent_factor": 0.3}, "file.pth")
    with pytest.raises(
        UserError, match=r"quant_max is 4.0 in the checkpoint, 5.0 in this run \(--quant_max\)"
    ):
        check_config(
            {**config, "quant_max": 4.0}, {**small_model.config, "latent_factor": 0.3}, "file.pth"
        )
    with pytest.raises(
        UserError, match=r"latent_factor is 0.3 in the checkpoint, 0.2325 in this run"
    ):
        check_config(config, {**small_model.config, "latent_factor": 0.2325}, "file.pth")


def test_a_published_checkpoint_is_what_it_is(small_model):
    parallel = TokenBridge(**SMALL, head="parallel")
    with pytest.raises(UserError, match="head is ar in the checkpoint, parallel in this run"):
        check_config({}, {**parallel.config, "latent_factor": 0.2325}, "published.pth")
    with pytest.raises(UserError, match="channel_order is"):
        check_config(
            {},
            {**TokenBridge(**SMALL, channel_order=range(16)).config, "latent_factor": 0.2325},
            "published.pth",
        )
    check_config({}, {**small_model.config, "latent_factor": 0.2325}, "published.pth")


def test_order_and_calibration_are_of_the_same_channels_only():
    stored = {
        "channel_order": list(range(16)),
        "channel_mean": [0.0] * 16,
        "vae_embed_dim": 16,
        "patch_size": 1,
    }

    def taken(vae_embed_dim: int, patch_size: int, **more) -> dict:
        flags = {"model": "tokenbridge_tiny", "quant_calibrate": False, "head": None}
        args = argparse.Namespace(vae_embed_dim=vae_embed_dim, patch_size=patch_size, **flags)
        tokenizer = TokenizerInfo({"embed_dim": vae_embed_dim, "ch_mult": [1, 1]}, 0.5, "vae.ckpt")
        return adopted_values(args, sizes_of, tokenizer, Start(FINETUNE, config={**stored, **more}))

    assert taken(16, 1) == {name: stored[name] for name in ("channel_order", "channel_mean")}
    assert list(taken(16, 1, latent_factor=1.0)) == ["channel_order"]
    assert taken(4, 2) == {}
