"""KL tokenizers of diffusers, as folders and from the Hub."""

import json

import pytest
import torch

from models.vae import AutoencoderKL
from tests.conftest import TINY
from tools import checkpoint as commands
from util.checksums import fingerprint
from util.errors import UserError

diffusers = pytest.importorskip("diffusers", reason="an optional extra: pip install diffusers")


@pytest.fixture
def folder(tmp_path):
    """A small tokenizer of stride 4 with 4 channels, as diffusers writes it."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, latent_channels=4, scaling_factor=0.25,
        shift_factor=0.5,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_a_tokenizer_of_diffusers_encodes_and_decodes_as_there(folder):
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    vae, latent_factor = AutoencoderKL.from_pretrained(folder)
    assert (vae.embed_dim, vae.stride, latent_factor) == (4, 4, 0.25)
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior, expected = vae.encode(images), theirs.encode(images).latent_dist
        assert torch.allclose(posterior.mode(), expected.mode() - 0.5, atol=1e-6)
        assert torch.allclose(posterior.std, expected.std, atol=1e-6)
        assert torch.allclose(
            vae.decode(posterior.mode()), theirs.decode(expected.mode()).sample, atol=1e-5
        )


def test_commands_take_tokenizers_of_diffusers(run, refused, folder, vae_path, images, tmp_path):
    cache = f"--img_size 16 --data_path {images} --cached_path {tmp_path}/cache --num_workers 0 --batch_size 8"
    run("main_cache", f"{cache} --vae_path {folder}")
    metadata = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert (
        metadata["vae"] == {"embed_dim": 4, "ch_mult": [1, 2, 2]}
        and metadata["latent_factor"] == 0.25
    )
    common = f"{TINY} --use_cached --cached_path {tmp_path}/cache --device cpu --output_dir {tmp_path}/run"
    run("main_tokenbridge", f"{common} --epochs 1 --warmup_epochs 0 --lr 1e-3")
    sampling = "--evaluate --no_metrics --num_images 4 --num_iter 2 --keep_images"
    run("main_tokenbridge", f"{common} {sampling} --vae_path {folder} --resume {tmp_path}/run")
    assert (tmp_path / "run" / "samples" / "00003.png").exists()
    other = refused(
        "main_tokenbridge", f"{common} {sampling} --vae_path {vae_path} --resume {tmp_path}/run"
    )
    assert "was trained differently" in other
    with pytest.raises(UserError, match="is a diffusers tokenizer"):
        commands.main(["export", str(folder), f"{tmp_path}/again"])


def test_tokenizers_of_diffusers_that_cannot_be_used_say_why(folder, monkeypatch):
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    whole, about = weights.read_bytes(), json.loads(config.read_text())
    config.write_text(json.dumps(about | {"latents_mean": [0.0] * 4}))
    with pytest.raises(UserError, match="scales each latent channel separately"):
        AutoencoderKL.from_pretrained(folder)
    config.write_text(json.dumps(about | {"layers_per_block": 2}))
    with pytest.raises(UserError, match="missing_keys"):
        AutoencoderKL.from_pretrained(folder)
    config.write_text(json.dumps(about))
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="diffusers cannot read"):
        AutoencoderKL.from_pretrained(folder)
    weights.write_bytes(whole)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers"):
        AutoencoderKL.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["bin", "fp16", "shards"])
def test_weights_in_another_form_are_named_with_what_to_do(folder, tmp_path, kind):
    vae = diffusers.AutoencoderKL.from_pretrained(folder)
    options = {
        "bin": {"safe_serialization": False},
        "fp16": {"variant": "fp16"},
        "shards": {"max_shard_size": "50KB"},
    }
    vae.save_pretrained(tmp_path / kind, **options[kind])
    files = sorted(path.name for path in (tmp_path / kind).glob("diffusion_pytorch_model*"))
    assert "diffusion_pytorch_model.safetensors" not in files
    for path in (tmp_path / kind, tmp_path / kind / files[0]):
        with pytest.raises(UserError) as error:
            AutoencoderKL.from_pretrained(path)
        assert files[0] in str(error.value) and "save_pretrained" in str(error.value)
    # What the message says helps.
    variant = {"variant": "fp16"} if 'variant="fp16"' in str(error.value) else {}
    diffusers.AutoencoderKL.from_pretrained(tmp_path / kind, **variant).save_pretrained(
        tmp_path / "whole"
    )
    found, _ = AutoencoderKL.from_pretrained(tmp_path / "whole")
    assert fingerprint(found) == fingerprint(AutoencoderKL.from_pretrained(folder)[0])
