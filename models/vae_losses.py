"""Losses of tokenizer training: L1 error, KL divergence, perceptual distance, adversarial loss."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from models.vae import AutoencoderKL, group_norm
from util.checkpoint.files import read_checkpoint
from util.checkpoint.load import matching
from util.errors import UserError

Distance = Callable[[Tensor, Tensor], Tensor]

# --------------------------------------------------------------------------------------------------
# Perceptual distance

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's
#: The compared layers of VGG-16: the last ReLU of each resolution.
VGG_LAYERS = (3, 8, 15, 22, 29)
#: Mean and std of the colors of ImageNet, for images in [-1, 1].
VGG_MEAN = 2 * torch.tensor([0.485, 0.456, 0.406]) - 1
VGG_STD = 2 * torch.tensor([0.229, 0.224, 0.225])


def perceptual_distance(path: str | Path | None, device: torch.device) -> Distance:
    """Return a function that computes the mean VGG-16 feature distance of two batches of images.

    The images are ``[B, 3, H, W]`` in [-1, 1]. The features of each position are scaled to unit
    length. Squared distances are averaged over positions and summed over :data:`VGG_LAYERS` (LPIPS,
    Zhang et al. 2018, without its learned weights). The distance is between 0 and 10.

    Args:
        path: torchvision's weights; by default their path in the folder of torch.hub. Nothing is
            downloaded.

    Raises:
        UserError: there are no weights, or they are not those of VGG-16.
    """
    # Loads torch._dynamo, which takes seconds: only if it is needed.
    from torchvision.models.vgg import cfgs, make_layers

    hub_path = Path(torch.hub.get_dir()) / "checkpoints" / VGG_URL.rsplit("/", 1)[1]
    path = Path(path) if path else hub_path
    if not path.is_file():
        raise UserError(
            f"no VGG-16 weights at {path}: fetch {VGG_URL} and put it there, pass its path as "
            "--vgg_weights, or train without perceptual loss: --perceptual_weight 0"
        )
    features = make_layers(cfgs["D"])  # without the classifier, the largest part of VGG-16
    weights = read_checkpoint(path)
    feature_weights = {
        name.removeprefix("features."): value
        for name, value in weights.items()
        if name.startswith("features.")
    }
    hint = f"It must be torchvision's VGG-16: {VGG_URL}"
    features.load_state_dict(matching(feature_weights, features.state_dict(), path, hint))
    features = features.requires_grad_(False).eval().to(device)
    mean = VGG_MEAN.to(device)[:, None, None]
    std = VGG_STD.to(device)[:, None, None]

    def distance(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros((), device=a.device)
        h = (torch.cat([a, b]) - mean) / std
        for number, layer in enumerate(features):
            h = layer(h)
            if number in VGG_LAYERS:
                unit_a, unit_b = F.normalize(h.float(), dim=1, eps=1e-6).chunk(2)
                total = total + (unit_a - unit_b).square().sum(dim=1).mean()
        return total

    return distance


# --------------------------------------------------------------------------------------------------
# Discriminator


class PatchDiscriminator(nn.Sequential):
    """Maps images ``[B, 3, H, W]``, H and W at least 16, to real-or-fake logits of patches.

    The logits are ``[B, 1, H / 8, W / 8]``. This is PatchGAN (Isola et al. 2017) with group norm,
    which has no running statistics and does not mix images.
    """

    def __init__(self, width: int = 64):
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for in_channels, out_channels in pairwise([width, 2 * width, 4 * width]):
            layers += [
                nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1),
                group_norm(out_channels),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(4 * width, 1, 3, padding=1))


# --------------------------------------------------------------------------------------------------
# All losses


class VAELosses(nn.Module):
    """A tokenizer, an optional discriminator, and the loss of both.

    One backward pass computes the gradients of two separate losses: the loss of the tokenizer has
    no gradient for the discriminator's weights, and that of the discriminator none for the
    tokenizer.

    Args:
        vae: the tokenizer.
        img_size: height and width of the images.
        kl_weight: weight of the KL divergence of an image in nats, relative to the absolute error
            of one pixel value.
        perceptual: a distance of images; None for none.
        perceptual_weight: weight of that distance, relative to the mean absolute error.
        disc_weight: weight of the adversarial loss, relative to the mean absolute error; 0 for no
            discriminator.
        disc_start: the training step at which the discriminator starts.

    Attributes:
        steps_done: returns the number of finished training steps; set by the training script.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        img_size: int,
        kl_weight: float,
        perceptual: Distance | None = None,
        perceptual_weight: float = 0.0,
        disc_weight: float = 0.0,
        disc_start: int = 0,
    ):
        super().__init__()
        self.vae = vae
        self.img_size = img_size
        self.kl_weight = kl_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.disc_weight = disc_weight
        self.disc_start = disc_start
        self.discriminator = PatchDiscriminator() if disc_weight > 0 else None
        self.steps_done: Callable[[], int] = lambda: 0
        self._sums: dict[str, Tensor] = {}  # by term: [sum over batches, number of batches]
        #: The description of these weights in checkpoints.
        self.config = {**vae.config, "discriminator": disc_weight > 0}
        self.metadata: dict = {}

    def optimizer_parts(self) -> list[list[dict]]:
        """Return the optimizer groups of the tokenizer and of the discriminator.

        The gradients of the two parts are clipped separately.
        """
        parts = [[{"params": [*self.vae.parameters()], "weight_decay": 0.0}]]
        if self.discriminator is not None:
            group = {
                "params": [*self.discriminator.parameters()],
                "weight_decay": 0.0,
                "betas": (0.5, 0.9),
            }
            parts.append([group])
        return parts

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean loss of images ``[B, 3, H, W]`` in [-1, 1]; labels are ignored."""
        # Reconstruction
        reconstruction, posterior = self.vae(images)
        reconstruction = reconstruction.float()
        error = (reconstruction - images).abs().mean()
        kl = posterior.kl().mean()
        terms = {"error": error, "kl": kl}
        loss = error
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, images)
            loss = loss + self.perceptual_weight * terms["perceptual"]

        # Adversarial loss of the tokenizer, and loss of the discriminator
        disc_loss: Tensor | float = 0.0
        if self.discriminator is not None and self.steps_done() < self.disc_start:
            # Zero gradients, which change nothing: all ranks exchange the same gradients in every
            # step.
            disc_loss = 0.0 * sum(parameter.sum() for parameter in self.discriminator.parameters())
        elif self.discriminator is not None:
            detached = {
                name: parameter.detach()
                for name, parameter in self.discriminator.named_parameters()
            }
            fake_logits = functional_call(self.discriminator, detached, reconstruction)
            terms["adversarial"] = -fake_logits.float().mean()
            loss = loss + self.disc_weight * terms["adversarial"]
            both = torch.cat([images, reconstruction.detach()])
            real, fake = self.discriminator(both).float().chunk(2)
            disc_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            terms["discriminator"] = disc_loss

        # Sums for the log
        if self.training:
            for name, value in terms.items():
                entry = torch.stack([value.detach(), torch.ones_like(value)])
                self._sums[name] = entry + self._sums.get(name, 0.0)
        return images[0].numel() * loss + self.kl_weight * kl + disc_loss

    def read_metrics(self) -> dict[str, Tensor]:
        """Return the unweighted mean of each term on this rank since the last call."""
        sums = self._sums
        self._sums = {}
        return {name: total / count for name, (total, count) in sums.items()}

    @torch.no_grad()
    def training_flops(self) -> int:
        """Return the operations of a training step per image: three forward passes.

        Only the tokenizer is counted, without the discriminator and the perceptual distance.
        """
        device = next(self.parameters()).device
        with FlopCounterMode(display=False) as counter:
            self.vae(torch.zeros(1, 3, self.img_size, self.img_size, device=device))
        return 3 * counter.get_total_flops()
