"""The losses of a tokenizer and its discriminator: their values, and which weights each of them reaches."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg
from torchvision.models.feature_extraction import create_feature_extractor

from models.vae import AutoencoderKL
from models.vae_losses import PatchDiscriminator, VAELosses, perceptual_distance
from tests.conftest import new_trainer
from util.errors import UserError


def tokenizer() -> AutoencoderKL:
    """A small one without a spread, so that nothing in it is random."""
    return AutoencoderKL(4, (1, 2), use_variational=False, ch=8, num_res_blocks=1)


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [*module.parameters()], retain_graph=True))


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    a, b = (torch.cat([each.flatten() for each in many]) for many in (a, b))
    return (a - b).norm() < 1e-4 * b.norm()


@pytest.fixture
def vgg_weights(tmp_path):
    """A file of VGG-16's features, drawn at random."""
    torch.save(
        vgg.VGG(vgg.make_layers(vgg.cfgs["D"])).features.state_dict(prefix="features."),
        tmp_path / "vgg.pth",
    )
    return tmp_path / "vgg.pth"


def test_an_image_counts_by_its_absolute_error_and_divergence():
    vae = AutoencoderKL(4, (1, 2), ch=8, num_res_blocks=1)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    losses = VAELosses(vae, 16, kl_weight=0.5)
    torch.manual_seed(1)
    loss = losses(images)
    torch.manual_seed(1)
    reconstruction, posterior = vae(images)
    kl = 0.5 * (posterior.mean**2 + posterior.std**2 - 1 - 2 * posterior.std.log()).sum(
        dim=(1, 2, 3)
    )
    expected = (reconstruction - images).abs().sum(dim=(1, 2, 3)) + 0.5 * kl
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    losses(2 * images)
    figures = losses.read_metrics()
    assert figures["kl"] > kl.mean() / 2 and set(figures) == {"error", "kl"}
    assert not losses.read_metrics()


def test_one_backward_pass_gives_the_gradients_of_two_losses():
    vae, images = tokenizer(), torch.rand(3, 3, 16, 16) * 2 - 1
    losses = VAELosses(vae, 16, kl_weight=0.0, disc_weight=0.25, disc_start=5)
    disc = losses.discriminator
    losses.steps_done = lambda: 5
    losses(images).backward()
    reconstruction, _ = vae(images)
    error = (reconstruction - images).abs().mean() - 0.25 * disc(reconstruction).mean()
    logits = disc(images), disc(reconstruction.detach())
    hinge = 0.5 * (F.relu(1 - logits[0]).mean() + F.relu(1 + logits[1]).mean())
    assert close([p.grad for p in vae.parameters()], gradients(3 * 16 * 16 * error, vae))
    assert close([p.grad for p in disc.parameters()], gradients(hinge, disc))
    assert any(p.grad.abs().max() > 1e-3 for p in disc.parameters())


def test_before_its_start_a_discriminator_changes_nothing_and_learns_nothing():
    images, vae = torch.rand(3, 3, 16, 16) * 2 - 1, tokenizer()
    plain = VAELosses(vae, 16, kl_weight=0.0)(images)
    losses = VAELosses(vae, 16, kl_weight=0.0, disc_weight=0.25, disc_start=5)
    losses.steps_done = lambda: 4
    loss = losses(images)
    assert torch.equal(loss, plain) and "discriminator" not in losses.read_metrics()
    assert not any(gradient.any() for gradient in gradients(loss, losses.discriminator))


def test_tokenizer_and_discriminator_have_their_gradients_clipped_apart():
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    losses = VAELosses(tokenizer(), 16, kl_weight=0.0, disc_weight=1.0)
    trainer = new_trainer(losses, parts=losses.optimizer_parts(), grad_clip=1e-2)
    state = trainer.state
    losses(images).backward()
    trainer.clip_and_step(torch.zeros(()), 1e-3)
    for module, decay in ((losses.vae, 0.9), (losses.discriminator, 0.5)):
        moments = [
            state.optimizer.state[parameter]["exp_avg"].norm() for parameter in module.parameters()
        ]
        assert (torch.stack(moments).norm() / (1 - decay)).item() == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("size", [16, 64])
def test_a_logit_is_of_a_patch(size):
    disc = PatchDiscriminator(8)
    images = torch.randn(2, 3, size, size)
    logits = disc(images)
    assert logits.shape == (2, 1, size // 8, size // 8)
    assert torch.allclose(disc(images[:1]), logits[:1], atol=1e-5)  # no image depends on another


def test_the_perceptual_distance_compares_directions_of_vggs_features(vgg_weights):
    distance = perceptual_distance(vgg_weights, torch.device("cpu"))
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    layers = {f"features.{number}": str(number) for number in (3, 8, 15, 22, 29)}
    with torch.device("meta"):
        model = vgg.vgg16()
    model = create_feature_extractor(model, layers)
    model.load_state_dict(torch.load(vgg_weights, weights_only=True), assign=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        features = [model.eval()(((image + 1) / 2 - mean) / std) for image in (a, b)]
    similar = [
        F.cosine_similarity(features[0][name], features[1][name], dim=1, eps=1e-12)
        for name in features[0]
    ]
    expected = sum((2 - 2 * each).mean() for each in similar)
    assert distance(a, b).item() == pytest.approx(expected.item(), rel=1e-3)
    assert distance(a, a) == 0
    a.requires_grad_()
    assert VAELosses(tokenizer(), 32, 0.0, distance, perceptual_weight=2.0)(a).requires_grad
    assert torch.autograd.grad(distance(a, b), a)[0].abs().max() > 0


def test_a_run_with_all_losses_shares_no_feature_weights(run, images, vgg_weights, tmp_path):
    flags = f"--ch 8 --ch_mult 1 2 --num_res_blocks 1 --vae_embed_dim 4 --num_workers 0 --data_path {images}"
    losses = f"--perceptual_weight 1 --vgg_weights {vgg_weights} --disc_weight 0.5"
    run(
        "main_vae",
        f"{flags} {losses} --img_size 32 --batch_size 8 --epochs 1 --output_dir {tmp_path}/run",
    )
    state = torch.load(tmp_path / "run" / "vae-last.pth", weights_only=True)
    assert {name.split(".")[0] for name in state["model"]} == {"vae", "discriminator"}


def test_weights_that_are_not_there_or_not_vggs_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match=r"hub/hub/checkpoints/vgg16-.*fetch https://.*--vgg_weights"
    ):
        perceptual_distance(None, torch.device("cpu"))
    torch.save({"features.0.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"does not fit: missing: .*torchvision's VGG-16"):
        perceptual_distance(tmp_path / "other.pth", torch.device("cpu"))
