"""Images are laid out for an experiment, and nothing else is removed for it."""

import pytest
from PIL import Image


@pytest.fixture
def source(tmp_path):
    """Two classes of three training images and of a held-out one."""
    for split, count in {"train": 3, "test": 1}.items():
        for name in "ab":
            (tmp_path / "source" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (4, 4)).save(tmp_path / "source" / split / name / f"{number}.png")
    return tmp_path / "source"


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("*/*/*")}


def test_the_first_images_of_each_class_are_linked_and_held_out_ones_all(run, source, tmp_path):
    run("experiments.data", f"--source {source} --images_per_class 3 --output_dir {tmp_path}/out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run(
        "experiments.data", f"--source {source} --images_per_class 2 --output_dir {tmp_path}/out"
    )  # made anew
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    train = {f"train/{name}/{number}.png" for name in "ab" for number in (0, 1)}
    assert files(tmp_path / "out") == train | {"val/a/0.png", "val/b/0.png"}
    assert len(files(source)) == 8


def test_a_folder_with_other_content_stays(refused, source, tmp_path):
    told = "is there, and not of this command"
    assert told in refused("experiments.data", f"--source {source} --output_dir {source}")
    assert told in refused("experiments.data", f"--output_dir {tmp_path}")
    assert len(files(source)) == 8
