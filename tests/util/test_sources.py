"""Every source of images: the same images and labels, each in one process; names, columns, and what is refused."""

import pickle
import subprocess
import sys

import datasets
import pytest
import torch

from tests.conftest import ROOT, damaged, point_to, write_images
from tests.rows import every_source, in_rows, own_cache, write_bare, write_rows  # noqa: F401
from util.errors import UserError
from util.loader import BadImages, ImageFolder, ImageFolderWithFilename, RankSampler, ShuffledRankSampler
from util.loader import image_transform as crop
from util.sources import UNLABELED, Rows, open_images


def items(data: ImageFolder) -> list[tuple]:
    return [data[index] for index in range(len(data))]


def test_every_source_gives_the_same_images_and_labels(images, tmp_path, served, monkeypatch):
    (images / "val").symlink_to(images / "train")
    expected = items(ImageFolder(images / "train", crop(16)))
    for name, path in every_source(images, tmp_path, served, monkeypatch).items():
        data = ImageFolder(open_images(path, "train"), crop(16))
        assert [label for _, label in data.samples] == [label for _, label in expected], name
        assert all(torch.equal(a, b) and i == j for (a, i), (b, j) in zip(items(data), expected, strict=True)), name
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
        assert all(torch.equal(image, other) for (image, *_), other in zip(items(data), expected, strict=True))


def test_two_processes_get_each_row_once_and_workers_read_their_own(images, tmp_path):
    rows = Rows(write_rows(tmp_path / "rows", in_rows(images / "train")), "train")
    data = ImageFolderWithFilename(rows, crop(16))
    whole = items(data)
    for kind in (RankSampler, ShuffledRankSampler):
        shares = [kind(16, r, 2) if kind is RankSampler else kind(data, 2, r, shuffle=True, seed=1) for r in (0, 1)]
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
def test_names_of_classes_become_folders_in_the_order_of_their_labels(images, tmp_path, names, folders):
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
    assert data.classes[3] == "class3" and data.read(5).tobytes() == Rows(path, "train", "image").read(5).tobytes()
    other = Rows(path, "train", "thumb", "coarse")
    assert other.classes == ["few", "many"] and other.samples[15][1] == 1
    assert other.read(5).tobytes() == data.read(0).tobytes() != data.read(5).tobytes()
    columns = r"thumb \(images\), coarse \(classes\), width \(integers\), image \(images\), label \(classes\)"
    with pytest.raises(UserError, match=rf"--image_column pixels: .*no such column of images, but {columns}"):
        Rows(path, "train", "pixels")
    with pytest.raises(UserError, match=r"--label_column image: .*no such column of labels, but thumb"):
        Rows(path, "train", None, "image")
    with pytest.raises(UserError, match=r"row 0 of .* has 100 in column width, which is no class's number"):
        Rows(path, "train", None, "width")
    none = write_rows(tmp_path / "none", rows.select_columns(["label", "width"]))
    with pytest.raises(UserError, match=r"no column of images: its columns are label \(classes\), width \(integers\)"):
        Rows(none, "train")


def test_images_and_labels_that_are_wrong_are_named(images, tmp_path):
    damaged(images / "train" / "class1" / "2.png")
    rows = in_rows(images / "train")
    empty = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    empty[9]["image"] = None
    data = ImageFolder(open_images(write_bare(tmp_path / "a.parquet", datasets.Dataset.from_list(empty)), "train"))
    for index, name in ((6, "1/train-00000006"), (9, "2/train-00000009")):
        with pytest.raises(UserError, match=rf"cannot read image {name} of .*a\.parquet \((?!.* at 0x)"):
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
    with pytest.raises(UserError, match=r"train holds images beside folders of images \(stray\.png and others\)"):
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
        tmp_path / "zeros.parquet": r"cannot open .*zeros\.parquet \((?!An error occurred).*\); check path and files",
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
    with pytest.raises(UserError, match="has no split validation or val or valid or test or testing: it has train"):
        Rows(only, "val")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs a package that is not installed: pip install datasets"):
        Rows(only, "train")


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its tries
    with pytest.raises(
        UserError, match=r"cannot open hf://datasets/owner/rows \(Couldn't reach 'owner/rows' on the Hub"
    ):
        Rows("hf://datasets/owner/rows", "train")


def test_nothing_loads_datasets_before_it_is_asked_for():
    code = "import sys, util.sources; print('datasets' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
