"""Packed caches hold what they were made from, and say so when they do not."""

import json
import pickle

import numpy as np
import pytest
import torch

from tests.conftest import SHORT, TINY
from tools import pack as pack_command
from util.data.caches import CachedFolder
from util.data.packed import DTYPES, VIEWS, PackedCache, open_cache, unpack
from util.errors import UserError


@pytest.fixture
def pack(cached, tmp_path):
    """Packs the small cache as a user would, into shards of 5 images, and gives the folder."""

    def convert(dtype: str = "fp32"):
        folder = tmp_path / f"packed-{dtype}"
        command = f"--cached_path {cached} --output_dir {folder} --cache_dtype {dtype} --shard_images 5 --num_workers 0"
        pack_command.main(command.split())
        return folder

    return convert


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_cache_holds_the_same(pack, cached, dtype):
    files, shards = CachedFolder(cached), open_cache(pack(dtype))
    assert isinstance(shards, PackedCache) and isinstance(open_cache(cached), CachedFolder)
    assert len(list(shards.root.glob("shard-*.npy"))) == 4 and len(shards) == 16
    assert (
        shards.classes == files.classes
        and shards.metadata["latent_factor"] == files.metadata["latent_factor"]
    )
    assert [name for name, _ in shards.samples] == [files.name(index) for index in range(16)]
    for cache in (files, shards):
        cache.set_draws(3, 1)
    exact = torch.float32 if dtype == "fp32" else DTYPES[dtype][0]
    for index in range(16):
        (expected, label), (moments, other) = files[index], shards[index]
        assert (
            torch.equal(moments, expected.to(exact).float())
            and label == other
            and moments.dtype == torch.float32
        )


def test_a_packed_cache_goes_back(pack, cached, tmp_path):
    pack_command.main(
        f"--unpack --cached_path {pack()} --output_dir {tmp_path}/files --num_workers 0".split()
    )
    for before in cached.rglob("*.npz"):
        with (
            np.load(before) as old,
            np.load(tmp_path / "files" / before.relative_to(cached)) as new,
        ):
            assert all(np.array_equal(old[name], new[name]) for name in VIEWS)
    assert CachedFolder(tmp_path / "files").metadata == CachedFolder(cached).metadata


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_packed_cache_is_training_on_its_files(run, pack, cached, tmp_path, workers):
    tiny = TINY.replace("--num_workers 0", f"--num_workers {workers}")
    weights = []
    for name, cache in (("files", cached), ("packed", pack())):
        out = tmp_path / name
        run(
            "main_tokenbridge",
            f"{tiny} {SHORT} --epochs 1 --use_cached --cached_path {cache} --output_dir {out}",
        )
        weights.append(torch.load(out / "checkpoint-last.pth", weights_only=True)["model"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_process_that_is_not_forked_gets_paths_not_data(pack):
    cache = PackedCache(pack())
    again = pickle.loads(pickle.dumps(cache))
    assert again.shards == [None] * 4 and torch.equal(again.view(7, 1), cache.view(7, 1))


def test_damage_is_named(pack, tmp_path):
    folder = pack("bf16")
    shard = folder / "shard-00001.npy"
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[-3] ^= 16
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match=r"shard-00001\.npy is damaged at class2/1\.png"):
        PackedCache(folder).view(9, 1)
    PackedCache(folder).view(9, 0)
    for content in (whole[:-5], b"", whole.replace(b"<u2", b"<u1")):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*shard-00001\.npy"):
            PackedCache(folder)
    shard.write_bytes(whole)
    about = json.loads((folder / "packed.json").read_text())
    for name, value in {
        "shards": [5, 5, 5],
        "dtype": "fp8",
        "shape": "big",
        "classes": None,
    }.items():
        (folder / "packed.json").write_text(json.dumps({**about, name: value}))
        with pytest.raises(UserError, match="damaged packed cache"):
            PackedCache(folder)
    (folder / "packed.json").write_text("{")
    with pytest.raises(UserError, match="it is damaged"):
        PackedCache(folder)
    (folder / "packed.json").write_text(json.dumps(about))
    names = json.loads((folder / "names.json").read_text())
    (folder / "names.json").write_text(json.dumps(["class0/../../../escaped", *names[1:]]))
    with pytest.raises(UserError, match="leads out of"):
        unpack(PackedCache(folder), tmp_path / "files", 0)
    assert not (tmp_path.parent / "escaped.npz").exists()


def test_what_cannot_be_converted_is_named(pack, cached, tmp_path):
    folder = pack()
    for command, message in {
        f"--cached_path {cached}": "are needed",
        f"--cached_path {folder} --output_dir {tmp_path}/x": "is packed already",
        f"--unpack --cached_path {cached} --output_dir {tmp_path}/x": "is not packed",
        f"--cached_path {cached} --output_dir {folder}": "holds a cache already",
        f"--cached_path {tmp_path}/none --output_dir {tmp_path}/x": "no cache at",
    }.items():
        with pytest.raises(UserError, match=message):
            pack_command.main(command.split())
    path = next(cached.rglob("*.npz"))
    np.savez(path, **{name: np.full((16, 4, 4), 1e6, np.float32) for name in VIEWS})
    with pytest.raises(UserError, match="exceed the range of fp16"):
        pack("fp16")
    assert not (tmp_path / "packed-fp16" / "packed.json").exists()
