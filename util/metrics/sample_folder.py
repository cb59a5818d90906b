"""The folder of generated images, and the files next to it: settings, weights, metrics."""

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
from util.files import FileWriter, wait_until, write_json, written_whole
from util.log import log


def label_of(number: int, num_images: int, class_num: int) -> int:
    """Return the class of image ``number``: images are sorted by class, equally many of each."""
    return number * class_num // num_images


class SampleFolder:
    """A folder of generated images, ``<path>/NNNNN.png``.

    These files are next to the folder:

    - ``<path>.json``: the settings and weights of the images, and their metrics once measured
    - ``<path>.png``: a grid of some images
    - ``<path>.npz``: all images, if requested
    - ``<path>-confidence/``: confidence maps, if requested
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def results_path(self) -> Path:
        """The JSON file of settings, weights and metrics."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def confidence(self) -> "SampleFolder":
        """The folder of the confidence maps."""
        return SampleFolder(self.path.with_name(self.path.name + "-confidence"))

    def image_path(self, number: int) -> Path:
        """Return the path of image ``number``."""
        return self.path / f"{number:05d}.png"

    def save(self, writer: FileWriter, images: Tensor, numbers: Iterable[int]) -> None:
        """Start to write images, bytes ``[N, 3, H, W]`` on the CPU, under their numbers."""
        for number, image in zip(numbers, images, strict=True):
            writer.submit(save_png, image, self.image_path(number))

    def numbers(self) -> set[int]:
        """Return the numbers of all images in the folder. Files with other names are ignored."""
        paths = [path for path in self.path.glob("*.png") if path.stem.isdecimal()]
        return {int(path.stem) for path in paths if path == self.image_path(int(path.stem))}

    def remove(self, count: int) -> int:
        """Remove the images numbered below ``count``, and the folder if it is then empty.

        Returns:
            the number of removed images.
        """
        own = [number for number in self.numbers() if number < count]
        for number in own:
            self.image_path(number).unlink()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()
        return len(own)

    # ----------------------------------------------------------------------------------------------
    # Settings and weights of the images

    def results(self) -> dict[str, Any]:
        """Return the content of :attr:`results_path`; empty if it cannot be read."""
        return read_results(self.results_path)

    @property
    def own_count(self) -> int:
        """The number of images that this project generated, from :attr:`results_path`; else 0."""
        settings = self.results().get("settings")
        count = settings.get("num_images") if isinstance(settings, dict) else None
        return count if isinstance(count, int) else 0

    def check_own(self) -> None:
        """Raise UserError if sampling would replace files that this project did not write."""
        check_own([self, self.confidence], self.results_path, self.own_count)

    def is_of(self, made_with: Mapping[str, Mapping]) -> bool:
        """Return whether the images in the folder have these settings and weights."""
        stored = self.results()
        expected = json.loads(json.dumps(made_with))  # lists instead of tuples, as in the file
        return all(stored.get(name) == value for name, value in expected.items())

    def prepare(self, made_with: Mapping[str, Mapping]) -> None:
        """Keep the images of an interrupted run with the same settings and weights; remove others.

        Only rank 0 calls this.

        Raises:
            UserError: the folder contains images that this project did not write.
        """
        self.check_own()
        if self.is_of(made_with):
            return
        stored = self.results()
        if self.remove_images():
            changes = []
            for part, values in made_with.items():
                stored_values = stored.get(part) or {}
                for name, value in values.items():
                    if stored_values.get(name) != value:
                        changes.append(f"{name} was {stored_values.get(name)}, now {value}")
            log.info("replacing the images of another run in %s: %s", self, ", ".join(changes))
        write_json(self.results_path, made_with)

    def remove_images(self) -> int:
        """Remove this project's images and confidence maps; return the number of images."""
        self.confidence.remove(self.own_count)
        return self.remove(self.own_count)

    # ----------------------------------------------------------------------------------------------
    # All images of the folder

    def images(self, count: int) -> PlainImages:
        """Return the images numbered below ``count``; wait up to a minute for other machines.

        Raises:
            UserError: some of them are missing.
        """
        if not wait_until(lambda: self.numbers().issuperset(range(count))):
            missing = sorted(set(range(count)) - self.numbers())
            first = self.image_path(missing[0])
            raise UserError(
                f"{len(missing)} of {count} images are missing ({first}, ...); "
                "run the same command again"
            )
        return PlainImages(self.path, paths=[self.image_path(number) for number in range(count)])

    def write_grid(self, images: PlainImages, class_names: Sequence[str] = ()) -> None:
        """Write a grid of up to 100 images, ten per row, evenly spaced over all images.

        Args:
            class_names: written below the images, which are sorted by class.
        """
        count = min(100, len(images))
        numbers = [i * len(images) // count for i in range(count)]
        captions = []
        if len(class_names) > 1:
            labels = [label_of(number, len(images), len(class_names)) for number in numbers]
            captions = [class_names[label] for label in labels]
        shown = torch.stack([images[number] for number in numbers])
        save_grid(shown, f"{self}.png", columns=10, captions=captions)

    def write_npz(self, images: PlainImages) -> None:
        """Write all images as ``arr_0``, uint8 ``[N, H, W, 3]``: the format of ADM's evaluator."""
        _, height, width = images[0].shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), height, width, 3)}
        with (
            written_whole(f"{self}.npz") as file,
            zipfile.ZipFile(file, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            # One image at a time: all of them may not fit in memory.
            for i in range(len(images)):
                member.write(images[i].permute(1, 2, 0).numpy().tobytes())


def read_results(path: Path) -> dict[str, Any]:
    """Return the dictionary in the JSON file ``path``; empty if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_own(folders: Sequence[SampleFolder], results_path: Path, count: int) -> None:
    """Check that a run's results and images only replace files of this project.

    Args:
        folders: the folders of the images.
        results_path: the JSON file of results, which is written before the images.
        count: the number of images of this project, from that file; 0 if it has none.

    Raises:
        UserError: numbered images, or ``results_path``, are of another origin.
    """
    other = [results_path] if not count and results_path.exists() else []
    for folder in folders:
        other += [
            folder.image_path(number) for number in sorted(folder.numbers()) if number >= count
        ]
    if other:
        more = f" and {len(other) - 1} more files were" if len(other) > 1 else " was"
        raise UserError(
            f"{other[0]}{more} not made by this project: move them, or choose another --output_dir"
        )
