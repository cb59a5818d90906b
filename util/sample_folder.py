"""The folder of a model's samples: numbered images, and beside it their settings, weights and metrics."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util import misc
from util.errors import UserError
from util.files import wait_until, write_json, written_whole
from util.images import save_grid, save_png
from util.metrics import PlainImages


class SampleFolder:
    """``<path>/NNNNN.png``, one image for each number.

    Beside it lie ``<path>.json`` (settings and weights the images were made with, and their metrics once there are
    any), ``<path>.png`` (a grid of some), ``<path>.npz`` (all, if asked for) and ``<path>-confidence/`` (maps, if asked
    for).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def results_path(self) -> Path:
        """The file of settings, weights and metrics."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def confidence(self) -> "SampleFolder":
        """The folder of the maps of confidence."""
        return SampleFolder(self.path.with_name(self.path.name + "-confidence"))

    def image_path(self, number: int) -> Path:
        """The file of image ``number``."""
        return self.path / f"{number:05d}.png"

    def save(self, images: Tensor, numbers: Iterable[int]) -> None:
        """Writes bytes ``[N, 3, H, W]`` under their numbers."""
        for number, image in zip(numbers, images, strict=True):
            save_png(image, self.image_path(number))

    def numbers(self) -> set[int]:
        """The numbers of the images that are there."""
        paths = [path for path in self.path.glob("*.png") if path.stem.isdecimal()]
        return {int(path.stem) for path in paths if path == self.image_path(int(path.stem))}

    # ----------------------------------------------------------------------------------------------------------------
    # What the images were made with.

    def results(self) -> dict[str, Any]:
        """What :attr:`results_path` holds; empty where there is nothing to read."""
        try:
            return json.loads(self.results_path.read_text())
        except (OSError, ValueError):
            return {}

    def is_of(self, made_with: Mapping[str, Mapping]) -> bool:
        """Whether the images there were made with these settings and weights."""
        before = self.results()
        as_read_back = json.loads(json.dumps(made_with))
        return all(before.get(name) == value for name, value in as_read_back.items())

    def prepare(self, made_with: Mapping[str, Mapping]) -> None:
        """Keeps the images that an interrupted run with the same settings and weights left, and removes others.

        One process does this for all.
        """
        if self.is_of(made_with):
            return
        before = self.results()
        if self.remove_images():
            entries = [
                (name, (before.get(part) or {}).get(name), value)
                for part, values in made_with.items()
                for name, value in values.items()
            ]
            changes = ", ".join(f"{name} {old} then, {new} now" for name, old, new in entries if old != new)
            misc.log.info("replacing the images of another run in %s: %s", self, changes)
        write_json(self.results_path, made_with)

    def remove_images(self) -> int:
        """Removes the numbered images and maps of confidence, and folders that are then empty; counts the images."""
        for part in (self.confidence.path, self.path):
            images = [path for path in part.glob("*.png") if path.stem.isdigit()]
            for path in images:
                path.unlink()
            if part.is_dir() and not any(part.iterdir()):
                part.rmdir()
        return len(images)

    # ----------------------------------------------------------------------------------------------------------------
    # All images of the folder.

    def images(self, count: int) -> PlainImages:
        """The images, in order; looks again for a minute where some are missing, which other machines wrote.

        Raises:
            UserError: there are not ``count`` of them.
        """
        wait_until(lambda: self.numbers().issuperset(range(count)))
        images = PlainImages(self.path)
        if len(images) != count:
            raise UserError(f"{self} holds {len(images)} images, not {count}; run the same command again")
        return images

    def write_grid(self, images: PlainImages) -> None:
        """Writes a picture of up to 100 of the images, evenly spaced, ten in a row."""
        count = min(100, len(images))
        shown = torch.stack([images[i * len(images) // count] for i in range(count)])
        save_grid(shown, f"{self}.png", columns=10)

    def write_npz(self, images: PlainImages) -> None:
        """Writes all images as ``arr_0``, uint8 ``[N, H, W, 3]``, as ADM's evaluator reads them."""
        with written_whole(f"{self}.npz") as file:
            np.savez(file, arr_0=np.stack([images[i].permute(1, 2, 0).numpy() for i in range(len(images))]))
