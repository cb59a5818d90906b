"""Trains a small classifier, in whose features images are compared (plain python)."""

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
from util.precision import check_finite
from util.process_group import process_group
from util.provenance import provenance
from util.rng import seed_everything

WIDTH = 64  # of the features
BATCH = 1000  # images at once where nothing is trained


class FeatureNet(nn.Module):
    """A convolutional classifier of byte images ``[B, 3, H, W]``, of 16 pixels and more.

    Args:
        classes: number of classes.

    Attributes:
        mean, std: of each feature over the training images, which standardize the features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, WIDTH)
        )
        self.last = nn.Linear(WIDTH, classes)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("std", torch.ones(WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.last(self.body(images.float() / 127.5 - 1).relu())

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Standardized features ``[N, 64]``, before their ReLU, of images ``[N, 3, H, W]`` on the network's device.

        After it some are 0 for nearly all images; divided by their deviations, a few images would decide any distance.
        """
        return torch.cat(
            [
                (self.body(part.float() / 127.5 - 1) - self.mean) / self.std
                for part in images.split(BATCH)
            ]
        )

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images ``[N, 3, H, W]`` that are classified as their ``labels [N]``."""
        found = torch.cat([self(part).argmax(1) for part in images.split(BATCH)])
        return (found == labels).double().mean().item()


def read_images(
    data_path: str, split: str, img_size: int, trained: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, list[str]]:
    """All images of a split as bytes ``[N, 3, H, W]``, their labels ``[N]``, and names of the classes.

    Args:
        trained: names of the classes in training, by which held-out images are labeled.
    """
    source = open_images(data_path, split)
    count = len(trained or source.classes)
    labels = check_classes(
        source.classes, count, source.root, trained, held_out=trained is not None
    )
    dataset = ImageFolder(source, image_transform(img_size))
    images = torch.stack([to_uint8(dataset[number][0]) for number in range(len(dataset))])
    return images, torch.tensor([labels[label] for _, label in source.samples]), source.classes


def train(net: FeatureNet, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Trains ``net`` by Adam with a falling learning rate, then measures the deviations of its features."""
    steps = max(1, len(images) // args.batch_size)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps)
    for _ in range(args.epochs):
        net.train()
        for chosen in (
            torch.randperm(len(images))[: steps * args.batch_size].view(steps, -1).to(images.device)
        ):
            batch = images[chosen]
            if args.mirror:
                mirrored = (torch.rand(len(batch)) < 0.5).to(images.device)
                batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
            F.cross_entropy(net(batch), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    net.eval()
    features = net.features(images)
    check_finite(features, "the trained classifier", "fp32")
    net.mean, net.std = features.mean(0), features.std(0)


def load_net(path: str | Path, device: torch.device) -> FeatureNet:
    """The classifier that this command wrote; UserError if there is none."""
    weights = read_checkpoint(path)
    net = FeatureNet(len(weights["last.bias"]))
    net.load_state_dict(weights)
    return net.to(device).eval()


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    parser = new_parser(__doc__, "experiments.features")
    parser.add_argument("--data_path", default="", help=DATA_PATH)
    parser.add_argument(
        "--img_size", type=int, default=32, help="height and width of the images in pixels"
    )
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    parser.add_argument("--batch_size", type=int, default=64, help="images of a step")
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="learning rate at the start; it falls to 0"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    add_mirror_arg(parser)
    add_device_arg(parser)
    parser.add_argument(
        "--output", default="features.pt", help="file of the weights; figures go to .json beside it"
    )
    return parser


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device) as device:
        check_positive(args, "img_size", "epochs", "batch_size", "lr")
        seed_everything(args.seed)
        images, labels, classes = read_images(args.data_path, "train", args.img_size)
        net = FeatureNet(len(classes)).to(device)
        train(net, images.to(device), labels.to(device), args)
        held_out, truth, _ = read_images(args.data_path, "val", args.img_size, classes)
        accuracy = net.accuracy(held_out.to(device), truth.to(device))
        with written_whole(args.output) as file:
            torch.save(net.state_dict(), file)
        write_json(
            Path(args.output).with_suffix(".json"),
            {"accuracy": accuracy, "args": vars(args), **provenance()},
        )
        log.info("%s: %.1f%% of held-out images are classified right", args.output, 100 * accuracy)


if __name__ == "__main__":
    errors.run(main)
