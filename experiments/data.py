"""Lays out the images of an experiment as ``train/<class>/`` and ``val/<class>/`` (plain python)."""

import argparse
import shutil
from pathlib import Path

from util import errors
from util.args import check_positive, new_parser
from util.data.sources import existing_folder

MADE = "made_by_experiments.data"  # a file in the folders that may be made anew


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    parser = new_parser(__doc__, "experiments.data")
    text = "digits: scikit-learn's, written as PNGs; or a folder of train/<class>/<image>, and val/ or test/ likewise"
    parser.add_argument("--source", default="digits", help=text)
    parser.add_argument(
        "--images_per_class", type=int, help="take the first of each class; by default all"
    )
    text = "folder to make, anew if this command made it before; a source's images are linked"
    parser.add_argument("--output_dir", default="data/digits", help=text)
    return parser


def make_anew(folder: Path) -> None:
    """Make a folder without images; UserError if there is one with content that this command did not make."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MADE).exists():
        raise errors.UserError(
            f"--output_dir {folder} is there, and not of this command: name another, or remove it"
        )
    for split in ("train", "val"):
        shutil.rmtree(folder / split, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MADE).touch()


def link(source: Path, folder: Path, limit: int | None) -> None:
    """Makes links in ``folder/<class>`` to the first ``limit`` images of ``source/<class>``, all without a limit."""
    for images in sorted(path for path in source.iterdir() if path.is_dir()):
        (folder / images.name).mkdir(parents=True)
        for image in sorted(images.iterdir())[:limit]:
            (folder / images.name / image.name).symlink_to(image.resolve())


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    if args.images_per_class is not None:
        check_positive(args, "images_per_class")
    out = Path(args.output_dir)
    if args.source == "digits":
        from demo.demo import write_digits  # needs scikit-learn

        make_anew(out)
        write_digits(out)
        return
    source = existing_folder(args.source, "image folder")
    train = existing_folder(source / "train", "image folder")
    held_out = existing_folder(
        source / ("val" if (source / "val").is_dir() else "test"), "image folder"
    )
    make_anew(out)
    link(train, out / "train", args.images_per_class)
    link(held_out, out / "val", None)


if __name__ == "__main__":
    errors.run(main)
