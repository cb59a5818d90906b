"""experiments.data arranges images, and removes nothing but what it wrote."""

import pytest
from PIL import Image


@pytest.fixture
def source(tmp_path):
    """Two classes with three training images and one held-out image each."""
    for split, count in {"train": 3, "test": 1}.items():
        for name in "ab":
            (tmp_path / "source" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (4, 4)).save(tmp_path / "source" / split / name / f"{number}.png")
    return tmp_path / "source"


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("*/*/*")}


def test_first_training_images_and_all_held_out_images_are_linked(run, source, tmp_path):
    flags = f"--source {source} --output_dir {tmp_path}/out"
    run("experiments.data", f"{flags} --images_per_class 3")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run("experiments.data", f"{flags} --images_per_class 2")  # replaces the images
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    train = {f"train/{name}/{number}.png" for name in "ab" for number in (0, 1)}
    assert files(tmp_path / "out") == train | {"val/a/0.png", "val/b/0.png"}
    assert len(files(source)) == 8


def test_only_some_classes_are_linked(run, refused, source, tmp_path):
    flags = f"--source {source} --output_dir {tmp_path}/out --classes"
    run("experiments.data", f"{flags} b")
    assert {name.split("/")[1] for name in files(tmp_path / "out")} == {"b"}
    assert "--classes c is not a folder of" in refused("experiments.data", f"{flags} b c")


def test_a_folder_with_other_content_is_refused(refused, source, tmp_path):
    message = "was not written by this command"
    assert message in refused("experiments.data", f"--source {source} --output_dir {source}")
    assert message in refused("experiments.data", f"--output_dir {tmp_path}")
    assert len(files(source)) == 8
