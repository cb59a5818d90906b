"""Weights that travel through folders, and files that tell by their weights what they are."""

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo

from models.tokenbridge import TokenBridge, tokenbridge_base, tokenbridge_huge, tokenbridge_large
from models.vae import AutoencoderKL
from tests.conftest import (
    SMALL,
    described,
    filled,
    published_parameters,
    published_state,
    same_states,
)
from tools import checkpoint as commands
from util.errors import UserError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "parallel"},
        {"head": "masked"},
        {"channels_per_group": 2, "quant_levels": 4, "quantizer": "linear"},
        {"channel_mean": [0.1] * 16, "channel_std": [2.0] * 16, "channel_order": list(range(16))},
    ],
    ids=["ar", "parallel", "masked", "linear pairs", "calibrated"],
)
def test_a_model_travels_through_a_folder(tmp_path, options):
    model = described(**options)
    model.save_pretrained(tmp_path / "saved", config={"note": "kept"})
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
    }
    again = TokenBridge.from_pretrained(tmp_path / "saved")
    assert same_states(model, again) and again.config == model.config and not again.training
    assert again.metadata == {**model.metadata, "note": "kept"}
    sampling = {"bsz": 2, "num_iter": 3, "seeds": [1, 2]}
    assert torch.equal(model.sample_tokens(**sampling), again.sample_tokens(**sampling))
    # Under the published names, as every program reads them.
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(published_state(model))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (
        tmp_path / "saved" / "config.json"
    ).read_bytes()
    assert (
        TokenBridge.from_pretrained(tmp_path / "saved", attn_dropout=0.3).config["attn_dropout"]
        == 0.3
    )


def test_the_model_card_has_figures_usage_and_licence(tmp_path):
    figures = {
        "frechet_inception_distance": 1.5512,
        "recall": 0.63,
        "settings": {"cfg": 3.1, "num_iter": 256},
    }
    card = {"figures": figures, "licence": "mit", "repo_id": "owner/repo"}
    described().save_pretrained(tmp_path, model_card_kwargs=card)
    text = (tmp_path / "README.md").read_text()
    assert huggingface_hub.ModelCard(text).data.license == "mit"
    for part in (
        "| FID | 1.551 |",
        "| recall | 0.63 |",
        "| cfg | 3.1 |",
        'TokenBridgePipeline.from_pretrained("owner/repo")',
        "one after the other",
        "cfg=3.0",
        "arxiv.org/abs",
    ):
        assert part in text
    other = str(described().generate_model_card())
    assert "## Metrics" not in other and "Not stated" in other
    masked = TokenBridge(**{**SMALL, "class_num": 1, "head": "masked"}).generate_model_card()
    assert "one after the other" not in str(masked) and "cfg=1.0" in str(masked)


@pytest.mark.slow
def test_published_weights_without_a_configuration_are_recognized(tmp_path):
    model = filled(tokenbridge_base(quant_levels=64))
    averages = {name: value + 1 for name, value in published_parameters(model).items()}
    torch.save(
        {"model": published_state(model), "model_ema": averages, "epoch": 399},
        tmp_path / "checkpoint-last.pth",
    )
    commands.main(
        [
            "convert",
            f"{tmp_path}/checkpoint-last.pth",
            f"{tmp_path}/only.safetensors",
            "--weights",
            "model",
        ]
    )
    assert same_states(TokenBridge.from_pretrained(tmp_path / "only.safetensors"), model)
    found = TokenBridge.from_pretrained(tmp_path)
    assert found.config == model.config
    names = {"class_names": ImageNetInfo("imagenet-1k").label_names()}
    assert found.metadata == {"latent_factor": 0.2325, "model": "tokenbridge_base", **names}
    assert torch.equal(found.class_emb.weight, averages["class_emb.weight"])
    assert torch.equal(
        TokenBridge.from_pretrained(tmp_path, ema=False).class_emb.weight, model.class_emb.weight
    )


@pytest.mark.parametrize("factory", [tokenbridge_base, tokenbridge_large, tokenbridge_huge])
def test_published_sizes_are_recognized_by_their_shapes(factory):
    with torch.device("meta"):
        model = factory(quant_levels=64)
    found = TokenBridge.config_of({"model": published_state(model)}, "file.pth")
    assert found["model"] == factory.__name__ and {**found, **model.config} == found


def test_models_and_tokenizers_are_told_apart(trained, vae_path):
    with pytest.raises(UserError, match="is a tokenizer, not a TokenBridge"):
        TokenBridge.from_pretrained(vae_path)
    with pytest.raises(UserError, match="is a TokenBridge, not a tokenizer"):
        AutoencoderKL.from_pretrained(trained / "checkpoint-last.pth")


def test_a_checkpoint_is_loaded_by_plain_pytorch(trained):
    """The lines of docs/files_and_weights.md; ``config`` also has class names."""
    checkpoint = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    assert "class_names" in checkpoint["config"]
    model = TokenBridge.from_config(checkpoint["config"]).eval()
    model.load_state_dict({**checkpoint["model"], **checkpoint["model_ema"]})
    expected = TokenBridge.from_pretrained(trained).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
