"""The model configuration: each entry has a meaning, a flag that agrees with it, and rules."""

import inspect
from dataclasses import fields

import pytest
import torch

import main_tokenbridge
from models.tokenbridge import MODELS, TokenBridge
from tests.conftest import SMALL, manifest
from util.model_config import (
    ENTRIES,
    EVERY_USE,
    KL16_CHANNEL_ORDER,
    MODEL_ENTRIES,
    Metadata,
    ModelConfig,
    entries,
)

#: Arguments of the release and their order, then those of this project.
ARGUMENTS = [
    "img_size",
    "vae_stride",
    "patch_size",
    "encoder_embed_dim",
    "encoder_depth",
    "encoder_num_heads",
    "decoder_embed_dim",
    "decoder_depth",
    "decoder_num_heads",
    "channel_embed_dim",
    "channel_depth",
    "channel_heads",
    "mlp_ratio",
    "norm_layer",
    "quant_levels",
    "vae_embed_dim",
    "mask_ratio_min",
    "label_drop_prob",
    "class_num",
    "attn_dropout",
    "proj_dropout",
    "buffer_size",
    "grad_checkpointing",
    "quant_min",
    "quant_max",
    "std_range",
    "channel_order",
    "head",
    "channels_per_group",
    "quantizer",
    "channel_mean",
    "channel_std",
    "balanced_masks",
]


@pytest.mark.parametrize("config", [ModelConfig, Metadata])
def test_every_entry_has_what_it_needs(config):
    flags = vars(main_tokenbridge.get_args_parser().parse_args([]))
    for field in fields(config):
        rules, text = entries(config)[field.name], field.metadata["argument"]["help"]
        assert text and not text.endswith("."), field.name
        assert rules.unlike_published in ("", "warn", "refuse"), field.name
        assert not rules.unlike_published or rules.published is not None, field.name
        assert set(rules.adopted_in) <= set(EVERY_USE), field.name
        if rules.published is not None and field.name not in ("channel_order", "quant_levels"):
            assert rules.published == field.default, field.name
        if flag := field.metadata["flag"].removeprefix("--"):
            assert rules.flags.startswith(f"--{flag}"), field.name
            default = flags[flag]
            if rules.adopted_in == EVERY_USE:
                assert default is None, field.name  # the checkpoint decides
            elif field.name == "quant_levels":
                assert (default, rules.from_flag(default)) == (6, 64)
            else:
                assert default == field.default, field.name


def test_values_convert_to_flags_and_back():
    for rules in ENTRIES.values():
        assert rules.from_flag(rules.to_flag(64)) == 64


def test_arguments_are_the_fields_in_their_order():
    parameters = inspect.signature(TokenBridge).parameters
    assert list(parameters) == [field.name for field in fields(ModelConfig)] == ARGUMENTS
    assert {name: parameters[name].default for name in ARGUMENTS} == {
        field.name: field.default for field in fields(ModelConfig)
    }
    with pytest.raises(TypeError, match="heads"):
        TokenBridge(heads=3)


def test_checkpoints_store_every_argument_but_the_norm():
    model = TokenBridge(**SMALL, norm_layer=torch.nn.LayerNorm)
    assert list(model.config) == list(MODEL_ENTRIES) == [n for n in ARGUMENTS if n != "norm_layer"]
    assert model.backbone.encoder_norm.eps == 1e-5
    again = ModelConfig.from_stored({**model.config, "latent_factor": 0.5})
    assert again.stored() == model.config
    assert again.channel_order == list(KL16_CHANNEL_ORDER)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_factories_build_the_published_models(size):
    with torch.device("meta"):
        model = MODELS[f"tokenbridge_{size}"]()
        other = MODELS[f"tokenbridge_{size}"](quant_levels=32, head="masked")
    assert model.config["quant_levels"] == 64
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == manifest(size)["parameters"]
    assert f"{count / 1e6:.2f}M" in MODELS[f"tokenbridge_{size}"].__doc__
    assert other.config["quant_levels"] == 32


def test_the_default_of_the_class_is_32_levels():
    assert (
        ModelConfig().quant_levels == TokenBridge(**{**SMALL, "quant_levels": 32}).head.levels == 32
    )
