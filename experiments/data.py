"""Arrange the images of an experiment as ``train/<class>/`` and ``val/<class>/``."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from util import errors
from util.args import check_positive, new_parser
from util.data.sources import existing_folder

#: Marks folders that this command has written, and may replace.
MARKER = "made_by_experiments.data"


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command line of this module."""
    parser = new_parser(__doc__, "experiments.data")
    text = (
        "digits (scikit-learn's, written as PNGs), photographs (eight of scikit-image and "
        "scikit-learn), or a folder with train/<class>/<image> and val/ or test/"
    )
    parser.add_argument("--source", default="digits", help=text)
    text = "use the first images of each class; by default all"
    parser.add_argument("--images_per_class", type=int, help=text)
    parser.add_argument("--classes", nargs="+", help="names of the classes to use; by default all")
    text = "folder to write; replaced if this command wrote it; images are links to --source"
    parser.add_argument("--output_dir", default="data/digits", help=text)
    return parser


#: Photographs that scikit-image ships; scikit-learn ships two more.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "motorcycle_left", "rocket")


def write_photographs(folder: Path) -> None:
    """Write eight photographs to ``folder/train``, as PNGs."""
    import skimage.data  # needed only here
    from sklearn.datasets import load_sample_images

    images = {
        file.stem: Image.open(file).convert("RGB")
        for file in Path(skimage.data.__file__).parent.iterdir()
        if file.stem in PHOTOGRAPHS
    }
    samples = load_sample_images()
    for name, pixels in zip(samples.filenames, samples.images, strict=True):
        images[Path(name).stem] = Image.fromarray(pixels)
    (folder / "train").mkdir()
    for name, image in images.items():
        image.save(folder / "train" / f"{name}.png")


def create_folder(folder: Path) -> None:
    """Create a folder without images, and remove images that this command wrote before.

    Raises:
        UserError: the folder has content that this command did not write.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise errors.UserError(
            f"--output_dir {folder} exists and was not written by this command: "
            "choose another folder, or remove it"
        )
    for split in ("train", "val"):
        shutil.rmtree(folder / split, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def link_images(
    source: Path, folder: Path, limit: int | None, classes: Sequence[str] | None = None
) -> None:
    """Link the first ``limit`` images (None: all) of each class folder of ``source``.

    Args:
        classes: names of the folders; by default all.

    Raises:
        UserError: one of the ``classes`` is not there.
    """
    folders = {path.name: path for path in sorted(source.iterdir()) if path.is_dir()}
    if missing := [name for name in classes or () if name not in folders]:
        known = ", ".join(folders)
        raise errors.UserError(f"--classes {missing[0]} is not a folder of {source}: {known} are")
    for class_folder in (folders[name] for name in classes or folders):
        (folder / class_folder.name).mkdir(parents=True)
        for image in sorted(class_folder.iterdir())[:limit]:
            (folder / class_folder.name / image.name).symlink_to(image.resolve())


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    if args.images_per_class is not None:
        check_positive(args, "images_per_class")
    output = Path(args.output_dir)
    if args.source == "digits":
        from demo.demo import write_digits  # needs scikit-learn

        create_folder(output)
        write_digits(output)
        return
    if args.source == "photographs":
        create_folder(output)
        write_photographs(output)
        return
    source = existing_folder(args.source, "image folder")
    train = existing_folder(source / "train", "image folder")
    split = "val" if (source / "val").is_dir() else "test"
    held_out = existing_folder(source / split, "image folder")
    create_folder(output)
    link_images(train, output / "train", args.images_per_class, args.classes)
    link_images(held_out, output / "val", None, args.classes)


if __name__ == "__main__":
    errors.run(main)
