"""Data sets in rows, made of folders of images: parquet files of ``datasets``, or with nothing but bytes."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest


def in_rows(folder: Path, names: Sequence[str] | None = None) -> datasets.Dataset:
    """The images of ``folder/<class>/<image>`` in the order of their names, in columns ``image`` and ``label``.

    Args:
        names: of the classes; by default those of the folders.
    """
    paths, folders = sorted(folder.glob("*/*")), sorted(path.name for path in folder.iterdir())
    label = datasets.ClassLabel(names=list(names or folders))
    content = {
        "width": [100 + row for row in range(len(paths))],
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [folders.index(path.parent.name) for path in paths],
    }
    features = {"width": datasets.Value("int64"), "image": datasets.Image(), "label": label}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def write_rows(root: Path, rows: datasets.Dataset, split: str = "train", files: int = 2) -> Path:
    """``root/data/<split>-NNNNN-of-NNNNN.parquet``, as the Hub lays them out; returns ``root``."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    for number in range(files):
        path = root / "data" / f"{split}-{number:05d}-of-{files:05d}.parquet"
        rows.shard(files, number, contiguous=True).to_parquet(path)
    return root


def write_bare(path: Path, rows: datasets.Dataset) -> Path:
    """One parquet file that does not say which columns are images and classes, as other programs write them."""
    pyarrow.parquet.write_table(rows.data.table.replace_schema_metadata(None), path)
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """``datasets`` keeps what it converts here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "converted"))


def every_source(images: Path, folder: Path, served, monkeypatch) -> dict[str, str]:
    """What ``--data_path`` may be, for the same images: the path or address of each kind."""
    rows = in_rows(images / "train")
    parquet = write_rows(folder / "rows", rows)
    write_rows(parquet, rows.select(range(0, 16, 2)), "validation", files=1)
    write_bare(images / "about.parquet", rows)  # is not asked for
    (folder / "split" / "train").mkdir(parents=True)
    rows.to_parquet(folder / "split" / "train" / "0000.parquet")
    half = write_bare(folder / "half.parquet", rows.select(range(8)))
    configured = "".join(
        f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("all", "half")
    )
    card = f"---\nconfigs:\n{configured}---\n".encode()
    served.add(
        "owner/two",
        {"README.md": card, "all.parquet": images / "about.parquet", "half.parquet": half},
    )
    for name, root in (("owner/rows", parquet), ("owner/files", images)):
        served.add(
            name,
            {
                str(path.relative_to(root)): path
                for path in root.rglob("*.p*")
                if path.parent != images
            },
        )
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served.endpoint)
    return {
        "splits": str(images),
        "classes": str(images / "train"),
        "parquet folder": str(parquet),
        "parquet in train": str(folder / "split"),
        "parquet file": str(write_bare(folder / "bare.parquet", rows)),
        "Hub": "hf://datasets/owner/rows",
        "Hub, a revision": "hf://datasets/owner/rows@main",
        "Hub, a configuration": "hf://datasets/owner/two/all",
        "Hub, files": "hf://datasets/owner/files",
    }
