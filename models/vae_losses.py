"""What trains a tokenizer: L1 error, perceptual distance and KL divergence; a discriminator of patches against it."""

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

# --------------------------------------------------------------------------------------------------------------------
# The perceptual distance.

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's
#: VGG-16's layers that are compared: the last ReLU of each resolution.
VGG_LAYERS = (3, 8, 15, 22, 29)
#: Mean and deviation of ImageNet's colours, for images in [-1, 1].
VGG_MEAN, VGG_STD = (
    2 * torch.tensor([0.485, 0.456, 0.406]) - 1,
    2 * torch.tensor([0.229, 0.224, 0.225]),
)


def perceptual_distance(path: str | Path | None, device: torch.device) -> Distance:
    """A function of two batches of images ``[B, 3, H, W]`` in [-1, 1]: their mean distance in VGG-16's features.

    The features of a position are scaled to unit length; squared distances are averaged over positions and summed over
    :data:`VGG_LAYERS` (LPIPS, Zhang et al. 2018, without its learned weights). It is 0 to 10.

    Args:
        path: torchvision's weights; by default where torch's hub keeps them. Nothing is downloaded.

    Raises:
        UserError: there are no weights, or not VGG-16's.
    """
    from torchvision.models.vgg import (  # loads torch._dynamo: only if it is needed
        cfgs,
        make_layers,
    )

    path = (
        Path(path)
        if path
        else Path(torch.hub.get_dir()) / "checkpoints" / VGG_URL.rsplit("/", 1)[1]
    )
    if not path.is_file():
        raise UserError(
            f"no VGG-16 weights at {path}: fetch {VGG_URL} and put it there, name its place with --vgg_weights, or "
            "train without: --perceptual_weight 0"
        )
    features = make_layers(cfgs["D"])  # without the classifier, which is most of VGG-16
    weights = read_checkpoint(path)
    learned = {
        name.removeprefix("features."): value
        for name, value in weights.items()
        if name.startswith("features.")
    }
    hint = f"It must hold torchvision's VGG-16: {VGG_URL}"
    features.load_state_dict(matching(learned, features.state_dict(), path, hint))
    features = features.requires_grad_(False).eval().to(device)
    mean, std = (values.to(device)[:, None, None] for values in (VGG_MEAN, VGG_STD))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        total, h = torch.zeros((), device=a.device), (torch.cat([a, b]) - mean) / std
        for number, layer in enumerate(features):
            h = layer(h)
            if number in VGG_LAYERS:
                ours, theirs = F.normalize(h.float(), dim=1, eps=1e-6).chunk(2)
                total = total + (ours - theirs).square().sum(dim=1).mean()
        return total

    return distance


# --------------------------------------------------------------------------------------------------------------------
# The discriminator.


class PatchDiscriminator(nn.Sequential):
    """Images ``[B, 3, H, W]``, H and W at least 16, to a logit for each patch, ``[B, 1, H / 8, W / 8]``: real or not.

    That of PatchGAN (Isola et al. 2017), with group norm, which has no state and does not mix images.
    """

    def __init__(self, width: int = 64):
        widths = [width, 2 * width, 4 * width]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 4, stride=2, padding=1),
                group_norm(after),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(4 * width, 1, 3, padding=1))


# --------------------------------------------------------------------------------------------------------------------
# All losses.


class VAELosses(nn.Module):
    """A tokenizer, its discriminator if it has one, and what both learn from: :meth:`forward` gives the loss of both.

    One backward pass gives the gradients of both, as of two losses: the tokenizer's does not reach the discriminator's
    weights, nor the discriminator's the tokenizer.

    Args:
        vae: the tokenizer.
        img_size: height and width of the images.
        kl_weight: of the KL divergence of an image, in nats, where the absolute error of each pixel value counts 1.
        perceptual: a distance of images; None for none.
        perceptual_weight: of that distance, where the mean absolute error counts 1.
        disc_weight: of what the discriminator makes of reconstructions, likewise; 0 for no discriminator.
        disc_start: the step of the run from which on there is one.

    Attributes:
        steps_done: tells the steps of the run; the run sets it.
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
        self.vae, self.img_size, self.kl_weight = vae, img_size, kl_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.disc_weight, self.disc_start = disc_weight, disc_start
        self.discriminator = PatchDiscriminator() if disc_weight > 0 else None
        self.steps_done: Callable[[], int] = lambda: 0
        self._sums: dict[str, Tensor] = {}  # a term's sum, and of how many batches
        #: What a checkpoint tells of these weights.
        self.config, self.metadata = {**vae.config, "discriminator": disc_weight > 0}, {}

    def optimizer_parts(self) -> list[list[dict]]:
        """The optimizer's groups of the tokenizer, and of the discriminator, whose gradients are clipped apart."""
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
        """The mean loss over ``images [B, 3, H, W]`` in [-1, 1]; labels play no part."""
        reconstruction, posterior = self.vae(images)
        reconstruction = reconstruction.float()
        error, kl = (reconstruction - images).abs().mean(), posterior.kl().mean()
        figures, each = {"error": error, "kl": kl}, error
        if self.perceptual is not None:
            figures["perceptual"] = self.perceptual(reconstruction, images)
            each = each + self.perceptual_weight * figures["perceptual"]
        separate = 0.0
        if self.discriminator is not None and self.steps_done() < self.disc_start:
            # Gradients of zero, which change nothing: all processes exchange the same gradients in all steps.
            separate = 0.0 * sum(parameter.sum() for parameter in self.discriminator.parameters())
        elif self.discriminator is not None:
            frozen = {
                name: parameter.detach()
                for name, parameter in self.discriminator.named_parameters()
            }
            figures["adversarial"] = (
                -functional_call(self.discriminator, frozen, reconstruction).float().mean()
            )
            each = each + self.disc_weight * figures["adversarial"]
            real, made = (
                self.discriminator(torch.cat([images, reconstruction.detach()])).float().chunk(2)
            )
            separate = figures["discriminator"] = 0.5 * (
                F.relu(1 - real).mean() + F.relu(1 + made).mean()
            )
        if self.training:
            for name, value in figures.items():
                self._sums[name] = torch.stack(
                    [value.detach(), torch.ones_like(value)]
                ) + self._sums.get(name, 0.0)
        return images[0].numel() * each + self.kl_weight * kl + separate

    def read_figures(self) -> dict[str, Tensor]:
        """Each term's mean since this was last called, without its weight; in this process."""
        sums, self._sums = self._sums, {}
        return {name: total / count for name, (total, count) in sums.items()}

    @torch.no_grad()
    def training_flops(self) -> int:
        """Operations of a training step for one image in the tokenizer itself: its forward pass, three times."""
        with FlopCounterMode(display=False) as counter:
            self.vae(
                torch.zeros(
                    1, 3, self.img_size, self.img_size, device=next(self.parameters()).device
                )
            )
        return 3 * counter.get_total_flops()
