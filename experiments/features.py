"""Train a small classifier whose features are used to compare images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util import errors
from util.args import DATA_PATH, add_device_arg, add_mirror_arg, check_positive, new_parser
from util.checkpoint.files import read_checkpoint
from util.data.classes import check_classes
from util.data.datasets import ImageFolder, image_transform
from util.data.images import to_uint8
from util.data.sources import open_images
from util.files import write_json, written_whole
from util.log import log
from util.precision import PRECISIONS, autocast, check_finite
from util.process_group import process_group
from util.provenance import provenance
from util.rng import seed_everything

FEATURE_DIM = 64
EVAL_BATCH = 1000


def conv_norm_relu(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Return a 3x3 convolution with batch norm and ReLU."""
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]


def plain_body() -> nn.Sequential:
    """Return three convolutions, for small images of simple things (digits)."""
    layers = [*conv_norm_relu(3, 32), *conv_norm_relu(32, 64, 2), *conv_norm_relu(64, 128, 2)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, FEATURE_DIM)
    )


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(*conv_norm_relu(width, width), *conv_norm_relu(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def resnet_body() -> nn.Sequential:
    """Return nine layers of convolutions, two pairs of them residual, for natural images."""
    layers = [
        *conv_norm_relu(3, 32),
        *conv_norm_relu(32, 64, 2),
        Residual(64),
        *conv_norm_relu(64, 128),
        nn.MaxPool2d(2),
    ]
    layers += [*conv_norm_relu(128, 256), nn.MaxPool2d(2), Residual(256)]
    return nn.Sequential(
        *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(256, FEATURE_DIM)
    )


#: Networks between images and features, by the name that selects them.
BODIES = {"plain": plain_body, "resnet": resnet_body}


class FeatureNet(nn.Module):
    """A convolutional classifier of uint8 images ``[B, 3, H, W]`` of at least 16 x 16 pixels.

    Args:
        classes: number of classes.
        body: a name in :data:`BODIES`.

    Attributes:
        mean, std: mean and std ``[64]`` of the features over the training images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classes: int, body: str = "plain"):
        super().__init__()
        self.body = BODIES[body]()
        self.last = nn.Linear(FEATURE_DIM, classes)
        self.register_buffer("mean", torch.zeros(FEATURE_DIM))
        self.register_buffer("std", torch.ones(FEATURE_DIM))

    def raw_features(self, images: Tensor) -> Tensor:
        """Return features ``[B, 64]`` before the last ReLU."""
        return self.body(images.float() / 127.5 - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, classes]``."""
        return self.last(self.raw_features(images).relu())

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return standardized features ``[N, 64]`` of images ``[N, 3, H, W]``.

        They are taken before the last ReLU. After it some features are 0 for nearly all images.
        Divided by their small std, a few images would dominate every distance.
        """
        batches = images.split(EVAL_BATCH)
        return torch.cat([(self.raw_features(batch) - self.mean) / self.std for batch in batches])

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the fraction of images ``[N, 3, H, W]`` that are classified as ``labels [N]``."""
        predicted = torch.cat([self(batch).argmax(1) for batch in images.split(EVAL_BATCH)])
        return (predicted == labels).double().mean().item()


def read_images(
    data_path: str, split: str, img_size: int, training_classes: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, list[str]]:
    """Return all images of a split ``[N, 3, H, W]`` (uint8), their labels ``[N]`` and class names.

    Args:
        training_classes: class names that define the labels of held-out images.
    """
    source = open_images(data_path, split)
    count = len(training_classes or source.classes)
    held_out = training_classes is not None
    labels = check_classes(source.classes, count, source.root, training_classes, held_out=held_out)
    dataset = ImageFolder(source, image_transform(img_size))
    images = torch.stack([to_uint8(dataset[number][0]) for number in range(len(dataset))])
    return images, torch.tensor([labels[label] for _, label in source.samples]), source.classes


def shifted(images: Tensor, distance: int) -> Tensor:
    """Shift images ``[B, 3, H, W]`` by up to ``distance`` pixels each way, all by the same."""
    padded = F.pad(images.float(), [distance] * 4, mode="reflect")
    top, left = torch.randint(2 * distance + 1, (2,)).tolist()
    return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]


def train_classifier(
    net: FeatureNet, images: Tensor, labels: Tensor, args: argparse.Namespace
) -> None:
    """Train ``net`` with Adam and a cosine schedule, then set mean and std of its features."""
    steps = max(1, len(images) // args.batch_size)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps)
    for _ in range(args.epochs):
        net.train()
        order = torch.randperm(len(images))[: steps * args.batch_size]
        for indices in order.view(steps, -1).to(images.device):
            batch = images[indices]
            if args.mirror:
                mirrored = (torch.rand(len(batch)) < 0.5).to(images.device)
                batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
            if args.shift:
                batch = shifted(batch, args.shift)
            with autocast(images.device, args.precision):
                logits = net(batch)
            F.cross_entropy(logits.float(), labels[indices]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    net.eval()
    features = net.features(images)
    check_finite(features, "the trained classifier", "fp32")
    net.mean, net.std = features.mean(0), features.std(0)


def load_net(path: str | Path, device: torch.device) -> FeatureNet:
    """Load a classifier that this command saved.

    Raises:
        UserError: the file does not exist.
    """
    content = read_checkpoint(path)
    net = FeatureNet(len(content["weights"]["last.bias"]), content["net"])
    net.load_state_dict(content["weights"])
    return net.to(device).eval()


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command line of this module."""
    parser = new_parser(__doc__, "experiments.features")
    parser.add_argument("--data_path", default="", help=DATA_PATH)
    text = "height and width of the images in pixels"
    parser.add_argument("--img_size", type=int, default=32, help=text)
    text = "the network: plain, for simple shapes, or resnet, for natural images"
    parser.add_argument("--net", choices=BODIES, default="plain", help=text)
    text = "shift training images by up to this many pixels"
    parser.add_argument("--shift", type=int, default=0, help=text)
    text = "precision of training; fp32 means no autocast"
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help=text)
    parser.add_argument("--epochs", type=int, default=20, help="epochs to train")
    parser.add_argument("--batch_size", type=int, default=64, help="batch size")
    text = "initial learning rate; a cosine schedule decays it to 0"
    parser.add_argument("--lr", type=float, default=1e-3, help=text)
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    add_mirror_arg(parser)
    add_device_arg(parser)
    text = "file to save the weights to; the accuracy is saved as .json beside it"
    parser.add_argument("--output", default="features.pt", help=text)
    return parser


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device) as device:
        check_positive(args, "img_size", "epochs", "batch_size", "lr")
        seed_everything(args.seed)
        images, labels, classes = read_images(args.data_path, "train", args.img_size)
        net = FeatureNet(len(classes), args.net).to(device)
        train_classifier(net, images.to(device), labels.to(device), args)
        held_out, true_labels, _ = read_images(args.data_path, "val", args.img_size, classes)
        accuracy = net.accuracy(held_out.to(device), true_labels.to(device))
        with written_whole(args.output) as file:
            torch.save({"net": args.net, "weights": net.state_dict()}, file)
        content = {"accuracy": accuracy, "args": vars(args), **provenance()}
        write_json(Path(args.output).with_suffix(".json"), content)
        log.info("%s: accuracy on held-out images %.1f%%", args.output, 100 * accuracy)


if __name__ == "__main__":
    errors.run(main)
