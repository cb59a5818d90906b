"""Every source of images: the same images and labels, each in one process; names, columns, and what is refused."""

import os
import pickle
import shutil
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from tests.conftest import damaged, point_to, write_images
from tests.rows import every_source, in_rows, own_cache, write_bare, write_rows  # noqa: F401
from util.data.datasets import BadImages, ImageFolder, ImageFolderWithFilename
from util.data.datasets import image_transform as crop
from util.data.loaders import RankSampler, ShuffledRankSampler
from util.data.sources import (
    ENDINGS,
    UNLABELED,
    AllImages,
    Folder,
    NoSplit,
    Rows,
    images_root,
    open_images,
    open_unlabeled,
)
from util.errors import UserError


def items(data: ImageFolder) -> list[tuple]:
    return [data[index] for index in range(len(data))]


def test_every_source_gives_the_same_images_and_labels(images, tmp_path, served, monkeypatch):
    (images / "val").symlink_to(images / "train")
    expected = items(ImageFolder(images / "train", crop(16)))
    for name, path in every_source(images, tmp_path, served, monkeypatch).items():
        data = ImageFolder(open_images(path, "train"), crop(16))
        assert [label for _, label in data.samples] == [label for _, label in expected], name
        assert all(
            torch.equal(a, b) and i == j
            for (a, i), (b, j) in zip(items(data), expected, strict=True)
        ), name
        bare = name in ("parquet file", "Hub, a configuration")
        assert data.classes == [str(i) if bare else f"class{i}" for i in range(4)]
    for name in ("rows", "data"):
        assert len(open_images(tmp_path / name, "val").samples) == (8 if name == "rows" else 16)
    assert len(open_images("hf://datasets/owner/two@main/half", "train").samples) == 8
    with pytest.raises(UserError, match=r"Config name is missing.*all.*half"):
        open_images("hf://datasets/owner/two", "train")


def test_images_without_classes_are_of_one(tmp_path):
    flat = write_images(tmp_path / "data", classes=1) / "train" / "class0"
    expected = [image for image, _ in items(ImageFolder(tmp_path / "data" / "train", crop(16)))]
    rows = write_rows(tmp_path / "rows", in_rows(flat.parent).remove_columns(["label"]))
    for path, name in ((flat, "images/2.png"), (rows, "images/train-00000002")):
        data = ImageFolderWithFilename(open_images(path, "train"), crop(16))
        assert data.classes == [UNLABELED] and data[2][1:] == (0, name)
        assert all(
            torch.equal(image, other)
            for (image, *_), other in zip(items(data), expected, strict=True)
        )


def test_two_processes_get_each_row_once_and_workers_read_their_own(images, tmp_path):
    rows = Rows(write_rows(tmp_path / "rows", in_rows(images / "train")), "train")
    data = ImageFolderWithFilename(rows, crop(16))
    whole = items(data)
    for kind in (RankSampler, ShuffledRankSampler):
        shares = [
            kind(16, r, 2) if kind is RankSampler else kind(data, 2, r, shuffle=True, seed=1)
            for r in (0, 1)
        ]
        names = []
        for share in shares:
            loader = torch.utils.data.DataLoader(data, batch_size=3, sampler=share, num_workers=1)
            for image, _, name in (item for batch in loader for item in zip(*batch, strict=True)):
                assert torch.equal(image, whole[int(name[-8:])][0])
                names.append(name)
        assert sorted(names) == [name for name, _ in rows.samples] and len(set(names)) == 16
    assert rows.samples[5] == ("class1/train-00000005", 1)
    assert pickle.loads(pickle.dumps(rows)).read(3).tobytes() == rows.read(3).tobytes()


@pytest.mark.parametrize(
    "names, folders",
    [
        (["ant", "bee", "cat", "dog"], ["ant", "bee", "cat", "dog"]),
        (["dog", "cat, tom", "bee/wasp", "ant"], ["0 dog", "1 cat, tom", "2 bee_wasp", "3 ant"]),
        (["..", "a", "b", "c"], ["0 ..", "1 a", "2 b", "3 c"]),
    ],
)
def test_names_of_classes_become_folders_in_the_order_of_their_labels(
    images, tmp_path, names, folders
):
    rows = Rows(write_rows(tmp_path / "rows", in_rows(images / "train", names)), "train")
    assert rows.classes == folders == sorted(folders)
    assert rows.samples[-1] == (f"{folders[3]}/train-00000015", 3)


def test_columns_are_found_by_type_then_by_name_or_as_asked_for(images, tmp_path):
    rows = in_rows(images / "train")
    both = rows.add_column("coarse", [label // 2 for label in rows["label"]])
    both = both.cast_column("coarse", datasets.ClassLabel(names=["few", "many"]))
    thumb = rows.select([0] * 16).select_columns(["image"]).rename_column("image", "thumb")
    both = datasets.concatenate_datasets([thumb, both], axis=1)
    both = both.select_columns(["thumb", "coarse", "width", "image", "label"])
    path = write_rows(tmp_path / "both", both)
    data = Rows(path, "train")
    assert (
        data.classes[3] == "class3"
        and data.read(5).tobytes() == Rows(path, "train", "image").read(5).tobytes()
    )
    other = Rows(path, "train", "thumb", "coarse")
    assert other.classes == ["few", "many"] and other.samples[15][1] == 1
    assert other.read(5).tobytes() == data.read(0).tobytes() != data.read(5).tobytes()
    columns = r"thumb \(images\), coarse \(classes\), width \(integers\), image \(images\), label \(classes\)"
    with pytest.raises(
        UserError,
        match=rf"--image_column pixels: .*no such column of images; its columns are {columns}",
    ):
        Rows(path, "train", "pixels")
    with pytest.raises(
        UserError, match=r"--label_column image: .*no such column of labels; its columns are thumb"
    ):
        Rows(path, "train", None, "image")
    with pytest.raises(
        UserError, match=r"row 0 of .* has 100 in column width, which is not the number of a class"
    ):
        Rows(path, "train", None, "width")
    none = write_rows(tmp_path / "none", rows.select_columns(["label", "width"]))
    with pytest.raises(
        UserError,
        match=r"no column of images: its columns are label \(classes\), width \(integers\)",
    ):
        Rows(none, "train")


def test_images_and_labels_that_are_wrong_are_named(images, tmp_path):
    damaged(images / "train" / "class1" / "2.png")
    rows = in_rows(images / "train")
    empty = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    empty[9]["image"] = None
    data = ImageFolder(
        open_images(write_bare(tmp_path / "a.parquet", datasets.Dataset.from_list(empty)), "train")
    )
    for index, name in ((6, "1/train-00000006"), (9, "2/train-00000009")):
        with pytest.raises(
            UserError, match=rf"cannot read image {name} of .*a\.parquet \((?!.* at 0x)"
        ):
            data[index]
    data.bad_images = BadImages(tmp_path)
    for _ in range(2):
        assert data[6][1] == 1 and data[9][1] == 2
    assert data.bad_images.count() == 2  # once, however often they are met
    fewer = open_images(write_rows(tmp_path / "few", rows.select(range(8))), "train")
    with pytest.raises(UserError, match="few has no images of class class2"):
        ImageFolder(fewer)
    unknown = rows.cast_column("label", datasets.Value("int64")).to_dict()
    for label in (-1, None, 10**9):
        unknown["label"][3] = label
        path = write_bare(tmp_path / f"{label}.parquet", datasets.Dataset.from_dict(unknown))
        with pytest.raises(UserError, match=f"row 3 of .* has {label} in column label"):
            open_images(path, "train")


def test_folders_that_are_not_clear_are_refused(images, tmp_path):
    (images / "train" / "class0" / "0.png").rename(images / "train" / "stray.png")
    with pytest.raises(
        UserError, match=r"train holds images beside folders of images \(stray\.png and others\)"
    ):
        open_images(images, "train")
    with pytest.raises(UserError, match=r"no image folder at .*/val"):
        open_images(images, "val")
    with pytest.raises(UserError, match=r"no image folder at .*/class1/val"):
        open_images(images / "train" / "class1", "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is not a folder of class folders with images"):
        open_images(tmp_path / "empty", "train")


def test_what_datasets_cannot_open_is_one_line(images, tmp_path, served, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served.endpoint)
    path = write_bare(tmp_path / "cut.parquet", in_rows(images / "train"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-900])
    (tmp_path / "zeros.parquet").write_bytes(whole[:4] + bytes(1000) + whole[1004:])
    served.add("owner/text", {"README.md": b"nothing"})
    served.add("owner/gated", {"README.md": b"nothing"})
    served.gated.add("owner/gated")
    cases = {
        path: r"cannot open .*cut\.parquet \(.*Parquet.*\); check path and files",
        tmp_path
        / "zeros.parquet": r"cannot open .*zeros\.parquet \((?!An error occurred).*\); check path and files",
        tmp_path / "no.parquet": r"cannot open .*no\.parquet \(",
        "hf://datasets/owner/none": r"cannot open .* \(Dataset 'owner/none' doesn't exist on the Hub.*hf auth login",
        "hf://datasets/owner/gated": r"\(Dataset 'owner/gated' is a gated dataset on the Hub.*hf auth login",
        "hf://datasets/owner/text@v9": r"cannot open .* \(Revision 'v9' doesn't exist",
        "hf://datasets/owner/text": r"cannot open hf://datasets/owner/text \(",
        "hf://owner/model": r"no data set on the Hub: write hf://datasets/owner/name",
    }
    for place, words in cases.items():
        with pytest.raises(UserError, match=words) as error:
            Rows(place, "train")
        assert "\n" not in str(error.value)
    only = write_rows(tmp_path / "only", in_rows(images / "train"))
    with pytest.raises(
        UserError, match="has no split validation or val or valid or test or testing: it has train"
    ):
        Rows(only, "val")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match="needs a package that is not installed: pip install datasets"
    ):
        Rows(only, "train")


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its tries
    with pytest.raises(
        UserError,
        match=r"cannot open hf://datasets/owner/rows \(Couldn't reach 'owner/rows' on the Hub",
    ):
        Rows("hf://datasets/owner/rows", "train")


# --------------------------------------------------------------------------------------------------------------------
# Which files of a folder are images, and which folders are classes.


def names_of(data: Folder) -> list[str]:
    return [data.name(index) for index in range(len(data.samples))]


def test_folders_are_read_in_torchvisions_order(tmp_path):
    files = [
        "b/2.png",
        "b/10.png",
        "b/x/1.JPG",
        "b-a/1.png",
        "b/X/z/1.webp",
        "b/x-1/0.pgm",
        "B/1.tif",
        "a b/é.png",
    ]
    for name in [*files, "b/notes.txt", "b/x/none.json"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    classes, labels = torchvision.datasets.folder.find_classes(tmp_path)
    samples = torchvision.datasets.folder.make_dataset(str(tmp_path), labels, IMG_EXTENSIONS)
    data = Folder(tmp_path)
    assert data.classes == classes and data.samples == samples and len(samples) == 8
    assert [path for path, _ in AllImages(tmp_path).samples] == sorted(
        (s for s, _ in samples), key=Path
    )


def test_files_of_other_programs_are_no_images(images, caplog):
    root = images / "train"
    before = names_of(Folder(root)), names_of(AllImages(root))
    for folder in (
        ".ipynb_checkpoints",
        "__MACOSX",
        "@eaDir",
        "class1/.ipynb_checkpoints",
        "class1/@eaDir/0.png",
    ):
        (root / folder).mkdir(parents=True)
        for name in ("0.png", "0-checkpoint.png"):
            shutil.copy(root / "class0" / "0.png", root / folder / name)
    for name in ("._0.png", ".DS_Store", "Thumbs.db", ".hidden.png", "desktop.ini"):
        (root / "class2" / name).write_bytes(b"\0\5\x16\7")
        (root / name).write_bytes(b"\0\5\x16\7")
    with caplog.at_level("INFO", logger="tokenbridge"):
        assert names_of(Folder(root)) == before[0] and names_of(AllImages(root)) == before[1]
        assert Folder(root).classes == [f"class{label}" for label in range(4)]
    assert "16 images of 4 classes, class0 to class3; skipped: 15 hidden or system" in caplog.text


def test_links_are_followed_but_never_upwards(images, tmp_path, caplog):
    root = images / "train"
    for link, target in {
        "up": images,
        "class0/self": root / "class0",
        "class1/deep/er": root,
        "class2/parent": tmp_path,
        "class9": root / "class3",
        "class3/elsewhere": tmp_path / "more",
    }.items():
        (root / link).parent.mkdir(exist_ok=True)
        (root / link).symlink_to(target)
    write_images(tmp_path / "more", classes=1)
    (tmp_path / "more" / "up").symlink_to(tmp_path)  # above where the link leads
    data = Folder(root)
    assert data.classes == ["class0", "class1", "class2", "class3", "class9"]
    counts = Counter(label for _, label in data.samples)
    assert counts == {0: 4, 1: 4, 2: 4, 3: 8, 4: 8} and len(AllImages(root).samples) == 28
    assert (
        "folders are read twice because of links" in caplog.text
        and f"{root}/class9 is {root}/class3" in caplog.text
    )


LAYOUTS = {
    # folders with images: what to train on, what is held out
    "train": ("train", NoSplit),
    "train val": ("train", "val"),
    "train val test": ("train", "val"),
    "train test": ("train", "test"),
    "train validation": ("train", "validation"),
    "Train VAL": ("Train", "VAL"),
    "train valid": ("train", "valid"),
    "Training Testing": ("Training", "Testing"),
    "train val bus": ("train", "val"),  # no two classes have such names
    "bus car": (".", NoSplit),
    "bus training_ground": (".", NoSplit),
    "val": (NoSplit, "val"),
    "val test": (NoSplit, "val"),
    "bus car train": (
        "has train beside bus, car, which hold images, too: if train is a split, move",
    )
    * 2,
    "bus Test": ("has Test beside bus",) * 2,
    "train val2017": ("has train beside val2017",) * 2,
    "train val valid": ("has val and valid, either of which may be the split val",) * 2,
    "train Train": ("has Train and train, either of which may be the split train",) * 2,
    "train2017 val2017": (
        "has train2017 and val2017: if these are splits, rename them to train and val",
    )
    * 2,
    "training_set test_set": ("has training_set and test_set: if these are splits",) * 2,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_found_or_refused(images, tmp_path, layout):
    root = tmp_path / "root"
    for name in layout.split():
        shutil.copytree(images / "train", root / name)
    (root / "labels").mkdir()
    (root / "labels" / "about.csv").touch()
    for split, expected in zip(("train", "val"), LAYOUTS[layout], strict=True):
        if isinstance(expected, str) and (root / expected).is_dir():
            assert images_root(root, split) == root / expected
        else:
            words = f"no image folder at {root}/{split}" if expected is NoSplit else expected
            with pytest.raises(UserError, match=words) as raised:
                images_root(root, split)
            assert (type(raised.value) is NoSplit) == (expected is NoSplit) and "\n" not in str(
                raised.value
            )


def test_held_out_images_that_are_the_training_images_are_told(images, caplog):
    (images / "val").symlink_to(images / "train")
    open_images(images, "val")
    assert f"{images}/val is the folder of the training images" in caplog.text


def test_images_of_every_ending_are_read_by_every_command(tmp_path, caplog):
    color = Image.new("RGB", (8, 8), (200, 30, 30))
    written = {
        "JPEG": "jpg JPEG jpe jfif mpo",
        "PNG": "png apng",
        "GIF": "gif",
        "WEBP": "webp",
        "TIFF": "tif tiff",
    }
    written |= {"BMP": "bmp", "DIB": "dib", "PPM": "ppm pgm pnm"} | (
        {"AVIF": "avif"} if ".avif" in ENDINGS else {}
    )
    (tmp_path / "class").mkdir()
    for kind, endings in written.items():
        for ending in endings.split():
            (color.convert("L") if ending == "pgm" else color).save(
                tmp_path / "class" / f"{ending}.{ending}", kind
            )
    for name in ("a.heic", "b.HEIC", "c.txt", "d", "e.svg"):
        (tmp_path / "class" / name).touch()
    with caplog.at_level("INFO", logger="tokenbridge"):
        data, plain = Folder(tmp_path), AllImages(tmp_path)
    count = sum(len(endings.split()) for endings in written.values())
    assert [path for path, _ in data.samples] == [path for path, _ in plain.samples] and len(
        data.samples
    ) == count
    for index in range(count):
        expected = [81] * 3 if "pgm" in data.name(index) else [200, 30, 30]
        assert np.abs(np.asarray(data.read(index), dtype=int) - expected).max() < 9, data.name(
            index
        )
    assert f"{tmp_path}: {count} images of 1 class, class; skipped: 2 .heic, 1 " in caplog.text
    assert "pillow-heif" in caplog.text


@pytest.mark.parametrize("make", [Folder, AllImages])
def test_a_folder_of_nothing_but_heic_says_so(tmp_path, make):
    (tmp_path / "class").mkdir()
    for number in range(3):
        (tmp_path / "class" / f"{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(
        UserError, match=r"skipped: 3 \.heic \(\.heic is HEIC, which Pillow .* pillow-heif"
    ):
        make(tmp_path)


def test_names_of_two_lines_are_told_in_one(images, tmp_path):
    path = images / "train" / "class0" / os.fsdecode(b"two\nlines\xff.png")
    path.write_bytes(b"none")
    data = ImageFolder(images / "train", bad_images=BadImages(tmp_path))
    with pytest.raises(UserError, match=r"two\\nlines\udcff\.png \(it is no image\)") as error:
        data.read(4)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------------
# Which columns are labels.


def with_labels(images: Path, path: Path, **columns: list) -> Path:
    """A parquet file of the images with other columns than their labels."""
    rows = in_rows(images / "train").remove_columns(["label", "width"])
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return write_bare(path, rows)


@pytest.mark.parametrize(
    "column, values, classes",
    [
        ("label", ["dog", "cat", "bee", "ant"], ["ant", "bee", "cat", "dog"]),
        ("category", ["b", "a", "b", "a"], ["a", "b"]),
        ("label", [True, False, True, False], ["False", "True"]),
        ("cls", [3, 2, 1, 0], ["0", "1", "2", "3"]),
        ("Label", [3, 2, 1, 0], ["0", "1", "2", "3"]),
        ("fine_label", [0, 1, 2, 3], ["0", "1", "2", "3"]),
        ("y", [0, 1, 1, 0], ["0", "1"]),
        ("class_name", ["x/y", "x", "x", "x"], ["0 x", "1 x_y"]),
    ],
)
def test_labels_may_be_text_and_have_other_names(images, tmp_path, column, values, classes):
    data = Rows(with_labels(images, tmp_path / "a.parquet", **{column: 4 * values}), "train")
    order = (
        sorted(set(map(str, values))) if len(classes) < 4 or isinstance(values[0], str) else classes
    )
    assert data.classes == classes and [label for _, label in data.samples] == 4 * [
        order.index(str(v)) for v in values
    ]


@pytest.mark.parametrize(
    "column, values, says",
    [
        (
            "species",
            [0, 1, 2, 3],
            r"may have labels in column species \(integers\): pass --label_column species, or",
        ),
        (
            "dog_class",
            ["a", "b", "c", "d"],
            r"column dog_class \(strings\): pass --label_column dog_class",
        ),
        (
            "mood",
            ["good", "bad", "bad", "bad"],
            r"column mood \(strings\): pass --label_column mood",
        ),
        ("sharp", [True, False, False, True], r"column sharp \(booleans\)"),
        (
            "label",
            [0.0, 1.0, 2.0, 3.0],
            r"column label \(floating-point numbers\): make them integers or strings",
        ),
        (
            "labels",
            [[0], [1, 2], [0], [3]],
            r"column labels \(List\): make them integers or strings",
        ),
        ("label", ["a", None, "b", "c"], "row 1 of .* has None in column label"),
    ],
)
def test_columns_that_may_be_labels_are_not_ignored(images, tmp_path, column, values, says):
    path = with_labels(images, tmp_path / "a.parquet", **{column: 4 * values})
    with pytest.raises(UserError, match=says):
        Rows(path, "train")
    assert Rows(path, "train", label_column="none").classes == [UNLABELED]
    assert len(open_unlabeled(path).samples) == 16


def test_other_columns_are_no_labels(images, tmp_path):
    numbers, texts = [*range(100, 116)], [f"a photograph, {number}" for number in range(16)]
    for columns in (
        {},
        {"width": 16 * [32], "caption": texts, "score": 4 * [0.5, 0.1, 0.2, 0.3], "id": numbers},
    ):
        data = Rows(with_labels(images, tmp_path / f"{len(columns)}.parquet", **columns), "train")
        assert data.classes == [UNLABELED]


def test_the_split_test_is_held_out_where_there_is_no_validation(images, tmp_path):
    rows = in_rows(images / "train")
    path = write_rows(write_rows(tmp_path / "rows", rows), rows.select(range(8)), "test")
    assert len(open_images(path, "val").samples) == 8
