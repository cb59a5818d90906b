"""The folder of a model's samples: numbered images, and beside it their settings, weights and metrics."""

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.data.datasets import PlainImages
from util.data.images import save_grid, save_png
from util.errors import UserError
from util.files import wait_until, write_json, written_whole
from util.log import log


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
        """The numbers of the images that are there; files of other names do not count."""
        paths = [path for path in self.path.glob("*.png") if path.stem.isdecimal()]
        return {int(path.stem) for path in paths if path == self.image_path(int(path.stem))}

    def remove(self, count: int) -> int:
        """Remove the images numbered below ``count``, and the folder if it is then empty; return their number."""
        own = [number for number in self.numbers() if number < count]
        for number in own:
            self.image_path(number).unlink()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()
        return len(own)

    # ----------------------------------------------------------------------------------------------------------------
    # What the images were made with.

    def results(self) -> dict[str, Any]:
        """What :attr:`results_path` holds; empty where there is nothing to read."""
        return read_results(self.results_path)

    @property
    def own_count(self) -> int:
        """How many images are this project's, by :attr:`results_path`: those numbered below."""
        settings = self.results().get("settings")
        count = settings.get("num_images") if isinstance(settings, dict) else None
        return count if isinstance(count, int) else 0

    def check_own(self) -> None:
        """Check that sampling replaces nothing but files of this project; UserError otherwise."""
        check_own([self, self.confidence], self.results_path, self.own_count)

    def is_of(self, made_with: Mapping[str, Mapping]) -> bool:
        """Whether the images there were made with these settings and weights."""
        before = self.results()
        as_read_back = json.loads(json.dumps(made_with))
        return all(before.get(name) == value for name, value in as_read_back.items())

    def prepare(self, made_with: Mapping[str, Mapping]) -> None:
        """Keep the images that an interrupted run with the same settings and weights left, and remove others.

        One process does this for all.

        Raises:
            UserError: there are images that this project has not made.
        """
        self.check_own()
        if self.is_of(made_with):
            return
        before = self.results()
        if self.remove_images():
            entries = [
                (name, (before.get(part) or {}).get(name), value)
                for part, values in made_with.items()
                for name, value in values.items()
            ]
            changes = ", ".join(
                f"{name} {old} then, {new} now" for name, old, new in entries if old != new
            )
            log.info("replacing the images of another run in %s: %s", self, changes)
        write_json(self.results_path, made_with)

    def remove_images(self) -> int:
        """Remove this project's images and maps of confidence; return the number of images."""
        self.confidence.remove(self.own_count)
        return self.remove(self.own_count)

    # ----------------------------------------------------------------------------------------------------------------
    # All images of the folder.

    def images(self, count: int) -> PlainImages:
        """Return the images numbered below ``count``; wait up to a minute for those that other machines wrote.

        Raises:
            UserError: some of them are missing.
        """
        if not wait_until(lambda: self.numbers().issuperset(range(count))):
            missing = sorted(set(range(count)) - self.numbers())
            first = self.image_path(missing[0])
            raise UserError(
                f"{len(missing)} of {count} images are missing ({first}, ...); run the same command again"
            )
        return PlainImages(self.path, paths=[self.image_path(number) for number in range(count)])

    def write_grid(self, images: PlainImages) -> None:
        """Writes a picture of up to 100 of the images, evenly spaced, ten in a row."""
        count = min(100, len(images))
        shown = torch.stack([images[i * len(images) // count] for i in range(count)])
        save_grid(shown, f"{self}.png", columns=10)

    def write_npz(self, images: PlainImages) -> None:
        """Write all images as ``arr_0``, uint8 ``[N, H, W, 3]``, as ADM's evaluator reads them, one after the other."""
        _, height, width = images[0].shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), height, width, 3)}
        with (
            written_whole(f"{self}.npz") as file,
            zipfile.ZipFile(file, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            for i in range(len(images)):
                member.write(images[i].permute(1, 2, 0).numpy().tobytes())


def read_results(path: Path) -> dict[str, Any]:
    """Return what the JSON file ``path`` holds; nothing where there is none or it holds no dictionary."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_own(folders: Sequence[SampleFolder], results_path: Path, count: int) -> None:
    """Check that a run's results and images replace nothing but files of this project.

    Args:
        folders: of the images.
        results_path: the JSON file that tells how many images this project made; it is written before them.
        count: that number, 0 if the file tells none.

    Raises:
        UserError: there are other images under numbers, or ``results_path`` is something else.
    """
    other = [path for path in [results_path] if not count and path.exists()]
    for folder in folders:
        other += [
            folder.image_path(number) for number in sorted(folder.numbers()) if number >= count
        ]
    if other:
        more = f" and {len(other) - 1} more files were" if len(other) > 1 else " was"
        raise UserError(
            f"{other[0]}{more} not made by this project: move them, or choose another --output_dir"
        )
