"""The tokenizer against the published model, a distribution library, and its own files."""

import pytest
import torch

from models.tokenizer import Tokenizer
from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from tests.conftest import filled, manifest, reference
from tests.fill import deterministic_fill
from util.checkpoint.vae_files import save_vae
from util.errors import UserError

KL16 = (1, 1, 2, 2, 4)


@torch.no_grad()
def test_moments_and_reconstruction_are_the_published_models(kl16):
    _, vectors = reference("vae")
    posterior = kl16.encode(vectors["image"])
    assert torch.allclose(posterior.parameters, vectors["moments"], atol=1e-4)
    assert torch.allclose(kl16.decode(posterior.mode()), vectors["reconstruction"], atol=1e-4)


@pytest.mark.slow
def test_fp16_decodes_closer_to_float32_than_bf16_does(kl16, monkeypatch):
    monkeypatch.setattr(
        "util.precision.effective_precision", lambda device, precision: precision
    )  # this CPU's may be fp32
    latents = reference("vae")[1]["moments"][:, :16, :1, :1]
    exact = Tokenizer(kl16, 1.0).decode_images(latents, "fp32").int()
    off = {
        name: (Tokenizer(kl16, 1.0).decode_images(latents, name).int() - exact).abs()
        for name in ("fp16", "bf16")
    }
    assert off["fp16"].max() <= 1 and off["fp16"].float().mean() < off["bf16"].float().mean() / 3


def test_names_shapes_and_order_are_the_published_ones(kl16):
    published = manifest("kl16")
    assert {name: list(value.shape) for name, value in kl16.state_dict().items()} == published[
        "shapes"
    ]
    assert [name for name, _ in kl16.named_parameters()] == published["parameter_order"]
    assert sum(p.numel() for p in kl16.parameters()) == published["parameters"] == 66_456_019


def test_the_posterior_is_a_clamped_diagonal_gaussian():
    moments = torch.randn(3, 8, 2, 2) * 20
    moments[0, 4:] = 1e4
    moments[1, 4:] = -1e4
    posterior = DiagonalGaussianDistribution(moments)
    normal = torch.distributions.Normal(moments[:, :4], (moments[:, 4:].clamp(-30, 20) / 2).exp())
    expected = (
        torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
        .flatten(1)
        .sum(1)
    )
    assert torch.allclose(posterior.kl(), expected, rtol=1e-4)
    assert torch.equal(posterior.mode(), moments[:, :4]) and torch.equal(
        posterior.parameters, moments
    )
    posterior = DiagonalGaussianDistribution(
        torch.cat([torch.full((1, 1, 300, 300), 2.0), torch.ones(1, 1, 300, 300)], 1)
    )
    draws = posterior.sample()
    assert draws.mean().item() == pytest.approx(
        2, abs=0.03
    ) and draws.std().item() == pytest.approx(0.5**-1 * 0.8244, abs=0.02)
    noise = torch.randn(1, 1, 300, 300)
    assert torch.equal(posterior.sample(noise), posterior.mean + posterior.std * noise)


@pytest.mark.parametrize(
    ("ch", "ch_mult", "side"), [(8, (1, 2), 8), (24, (1, 2, 2, 4), 2), (32, (1,), 16)]
)
def test_any_width_and_stride(ch, ch_mult, side):
    vae = AutoencoderKL(4, ch_mult, ch=ch, num_res_blocks=1)
    image = torch.randn(2, 3, 16, 16)
    posterior = vae.encode(image)
    assert posterior.mean.shape == (2, 4, side, side) and vae.stride == 16 // side
    assert vae.decode(posterior.sample()).shape == image.shape


def test_without_variation_samples_are_the_mode():
    posterior = AutoencoderKL(4, (1, 1), use_variational=False, ch=8).encode(
        torch.randn(1, 3, 8, 8)
    )
    assert torch.allclose(posterior.sample(), posterior.mode(), atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Files.


def test_a_file_rebuilds_its_tokenizer(tmp_path):
    vae = filled(AutoencoderKL(4, (1, 2), ch=16, num_res_blocks=1))
    save_vae(tmp_path / "vae.ckpt", vae, 0.7)
    loaded, latent_factor = AutoencoderKL.from_pretrained(tmp_path / "vae.ckpt")
    image = torch.randn(1, 3, 8, 8)
    assert latent_factor == 0.7 and loaded.stride == 2 and not loaded.training
    assert torch.equal(loaded.encode(image).parameters, vae.encode(image).parameters)


def test_the_published_file_may_hold_more_but_not_less(tmp_path, kl16, caplog):
    path = tmp_path / "kl16.ckpt"
    weights = deterministic_fill(kl16.state_dict())
    torch.save({"model": {**weights, "loss.logvar": torch.zeros(1)}}, path)
    loaded, latent_factor = AutoencoderKL.from_pretrained(path)
    assert latent_factor == 0.2325 and "loss.logvar" in caplog.text
    assert torch.equal(loaded.quant_conv.weight, kl16.quant_conv.weight)
    assert torch.equal(
        AutoencoderKL(16, KL16, ckpt_path=path).quant_conv.weight, kl16.quant_conv.weight
    )

    weights.pop("quant_conv.weight")
    weights["encoder.conv_in.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save({"model": weights}, path)
    with pytest.raises(
        UserError,
        match=r"missing: quant_conv.weight.*encoder.conv_in.weight \[64, 3, 3, 3\] \(expected",
    ):
        AutoencoderKL.from_pretrained(path)
