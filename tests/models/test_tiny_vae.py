"""Tiny autoencoders: the module, and the files that it is read from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from models.tiny_vae import TinyAutoencoder
from models.tokenizer import CachedMoments, Tokenizer
from models.vae import AutoencoderKL
from tests.conftest import OWN, filled, same_states
from tests.fill import deterministic_fill
from util.checkpoint.vae_files import save_vae_folder
from util.checksums import fingerprint
from util.errors import UserError


def write_pair(folder, model: TinyAutoencoder, name: str = "taef2", suffix: str = ".pth") -> None:
    """Write the two files of a model as its author does, in float16."""
    folder.mkdir(exist_ok=True)
    for part in ("encoder", "decoder"):
        module = getattr(model, part)
        weights = {name: value.half() for name, value in module.state_dict().items()}
        path = folder / f"{name}_{part}{suffix}"
        torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)


def as_diffusers(model: TinyAutoencoder) -> dict[str, torch.Tensor]:
    """Return weights under the names of diffusers, where the decoder's clamp has no number."""
    parts = {"encoder": 0, "decoder": 1}
    return {
        ".".join([part, "layers", str(int(number) - parts[part]), *rest]): value
        for name, value in model.state_dict().items()
        for part, number, *rest in [name.split(".")]
    }


@pytest.fixture
def tiny() -> TinyAutoencoder:
    """A model of TAEF2's architecture with reproducible weights that float16 can represent."""
    model = filled(TinyAutoencoder(6, ch=8, pooled=True))
    return model.half().float()


def test_taef2_has_the_published_weights_and_shapes():
    model = filled(TinyAutoencoder(32, pooled=True))
    sizes = [
        sum(each.numel() for each in part.parameters()) for part in (model.encoder, model.decoder)
    ]
    assert sizes == [1338528, 1338499]
    names = model.state_dict()
    assert len(names) == 2 * 79 and names["encoder.11.pool.0.weight"].shape == (256, 64, 1, 1)
    assert names["decoder.5.pool.1.bias"].shape == (256,) and "decoder.7.bias" not in names
    with torch.no_grad():
        posterior = model.encode(torch.rand(2, 3, 32, 48) * 2 - 1)
        assert posterior.mode().shape == (2, 32, 4, 6)
        assert model.decode(posterior.mode()).shape == (2, 3, 32, 48)


def test_the_posterior_has_no_variance(tiny):
    posterior = Tokenizer(tiny, 0.5).encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert torch.equal(posterior.sample(), posterior.mode()) and not posterior.std.any()
    assert posterior.moments.shape == (2, 6, 2, 2) and posterior.distribution.kl().isinf().all()
    cached = CachedMoments(0.5, deterministic=True).encode(posterior.moments)
    assert torch.equal(cached.sample(), posterior.mode())


@pytest.mark.parametrize("channels", [4, 16])
def test_folders_of_diffusers_encode_and_decode_as_there(tmp_path, channels):
    diffusers = pytest.importorskip("diffusers", reason="an optional extra: pip install diffusers")
    widths = (8, 8, 8, 8)
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        latent_channels=channels, scaling_factor=0.5, shift_factor=0.25,
    ).eval()  # fmt: skip
    theirs.load_state_dict(deterministic_fill(theirs.state_dict()))
    theirs.save_pretrained(tmp_path / "taesd")
    vae, latent_factor = AutoencoderKL.from_pretrained(tmp_path / "taesd")
    assert isinstance(vae, TinyAutoencoder) and (vae.embed_dim, vae.stride) == (channels, 8)
    assert latent_factor == 0.5 and not any(each.requires_grad for each in vae.parameters())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents, expected = vae.encode(images).mode(), theirs.encode(images).latents
        assert torch.allclose(latents, expected - 0.25, atol=1e-6)
        assert torch.allclose(vae.decode(latents), theirs.decode(expected).sample, atol=1e-5)

    theirs.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(UserError, match=r'AutoencoderTiny.from_pretrained\(".*, variant="fp16"'):
        AutoencoderKL.from_pretrained(tmp_path / "half")
    config = tmp_path / "taesd" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"act_fn": "silu"}))
    with pytest.raises(UserError, match=r"'act_fn': 'silu'.* not supported"):
        AutoencoderKL.from_pretrained(tmp_path / "taesd")


def test_all_files_of_a_tokenizer_give_the_same_weights(tiny, tmp_path, served):
    write_pair(tmp_path / "pair", tiny)
    write_pair(tmp_path / "safe", tiny, suffix=".safetensors")
    weights = as_diffusers(tiny)
    save_file(weights, tmp_path / "taef2.safetensors")
    save_vae_folder(tmp_path / "own", tiny, 1.0)
    served.add(OWN, {f"pair/{path.name}": path for path in (tmp_path / "pair").iterdir()})
    for name in (
        "pair",
        "pair/taef2_encoder.pth",
        "pair/taef2_decoder.pth",
        "safe",
        "taef2.safetensors",
        "own",
    ):
        tokenizer = Tokenizer.from_pretrained(str(tmp_path / name))
        assert same_states(tokenizer.vae, tiny) and tokenizer.vae.config == tiny.config, name
        assert tokenizer.fingerprint == fingerprint(tiny) and tokenizer.latent_factor == 1.0
        assert tokenizer.info.stride == 8 and tokenizer.info.moments_shape(64) == (6, 8, 8)
    address = f"hf://{OWN}/pair/taef2_decoder.pth"
    assert same_states(Tokenizer.from_pretrained(address).vae, tiny)


def test_pairs_that_cannot_be_used_say_why(tiny, tmp_path):
    folder = tmp_path / "pair"

    def error(path) -> str:
        with pytest.raises(UserError) as raised:
            AutoencoderKL.from_pretrained(path)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    write_pair(folder, tiny)
    (folder / "taef2_decoder.pth").rename(tmp_path / "decoder.pth")
    for path in (folder, folder / "taef2_encoder.pth"):
        assert "needs its decoder, taef2_decoder.pth, in the same folder" in error(path)
    write_pair(tmp_path / "other", filled(TinyAutoencoder(4, ch=8)))
    shutil.copy(tmp_path / "other" / "taef2_decoder.pth", folder)
    assert "encoder has 6 latent channels, the decoder 4" in error(folder)
    write_pair(tmp_path / "other", filled(TinyAutoencoder(6, ch=12, pooled=True)))
    shutil.copy(tmp_path / "other" / "taef2_decoder.pth", folder)
    assert "does not fit: of another shape" in error(folder)
    write_pair(folder, tiny, name="taesd")
    assert "several tokenizers" in error(folder)
    torch.save({"0.weight": torch.ones(1)}, folder / "taesd_decoder.pth")
    assert "is not a tiny autoencoder" in error(folder / "taesd_encoder.pth")
    assert "no checkpoint at" in error(folder / "taef1_encoder.pth")
    assert "no checkpoint at" in error(folder / "misspelt.pth")
