"""Files that were damaged or made to harm: each is refused in one line, or gives what it says; none does anything else.

Three hundred of them: checkpoints, tokenizers and caches, cut short, with bits flipped, with entries of other shapes,
types and values, and with pickles that would create a file.
"""

import copy
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import SMALL, filled, published_parameters, published_state, training_state
from util.checkpoint.runs import read_newest_checkpoint
from util.checkpoint.vae_files import tokenizer_config
from util.config import check_config
from util.data.caches import CACHE_METADATA, CachedFolder
from util.errors import UserError

SIZES = {**SMALL, "vae_embed_dim": 4}  # few entries
OTHERS = [
    None,
    "text",
    7,
    -3,
    1.5,
    float("nan"),
    [],
    [1, 2],
    {},
    {"a": 1},
    (1, 2),
    b"bytes",
    torch.tensor(1),
    True,
]


class Trap:
    """Unpickling it would create a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --------------------------------------------------------------------------------------------------------------------
# Damage to bytes, and to one entry somewhere in nested dictionaries.


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flip(data: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 30])):
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def blank(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :]


BYTES = {"cut": cut, "flip": flip, "blank": blank}


def places(value: dict, path: tuple = ()) -> list[tuple]:
    """Paths of keys to all entries of nested dictionaries."""
    found = []
    for key, entry in value.items():
        found.append((*path, key))
        found += places(entry, (*path, key)) if isinstance(entry, dict) else []
    return found


def change(content: dict, draw: random.Random, what: Callable, tensors: bool) -> dict:
    """A copy of ``content`` with one entry replaced by ``what`` makes of it; of tensors only, or of anything."""
    content = copy.deepcopy(content)
    candidates = []
    for path in places(content):
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        if not tensors or (
            isinstance(holder[path[-1]], torch.Tensor) and holder[path[-1]].is_floating_point()
        ):
            candidates.append((holder, path[-1]))
    # Few entries lie near the root, and matter as much as the many below.
    holder, key = draw.choice(
        candidates if tensors else candidates[:12] + draw.choices(candidates, k=12)
    )
    holder[key] = what(holder[key])
    return content


def with_nan(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[value.numel() // 2] = float("nan")
    return value


def entry_damage(kind: str, content: dict, draw: random.Random, trap: Path) -> dict:
    if kind == "shape":
        return change(
            content, draw, lambda v: draw.choice([v[None], v.flatten()[:-1], v.new_zeros(0)]), True
        )
    if kind == "dtype":
        kinds = [
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.int64,
            torch.bool,
            torch.complex64,
        ]
        return change(content, draw, lambda v: v.to(draw.choice(kinds)), True)
    if kind == "nan":
        return change(content, draw, with_nan, True)
    if kind == "type":
        return change(content, draw, lambda _: draw.choice(OTHERS), False)
    assert kind == "trap"
    return change(content, draw, lambda _: Trap(trap), False)


def spoilt(tmp_path: Path, content: dict, kind: str, draw: random.Random) -> tuple[Path, dict]:
    """A ``torch.save`` file of ``content`` with one damage, and what an undamaged reading of it would give."""
    path = tmp_path / "checkpoint-last.pth"
    if kind in BYTES:
        torch.save(content, path)
        path.write_bytes(BYTES[kind](path.read_bytes(), draw))
        return path, content
    says = entry_damage(kind, content, draw, tmp_path / "trace")
    if kind == "trap" and draw.random() < 0.3:
        path.write_bytes(pickle.dumps(says, protocol=2))
    else:
        torch.save(says, path)
    return path, says


def same(loaded: dict[str, torch.Tensor], said: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(value, torch.as_tensor(said[name]).to(value.dtype))
        for name, value in loaded.items()
    )


KINDS = ["cut", "flip", "blank", "shape", "dtype", "nan", "type", "trap"]

# --------------------------------------------------------------------------------------------------------------------
# Checkpoints.


def resumed(path: Path) -> tuple[TokenBridge, ModelEmaV3, torch.optim.AdamW]:
    """A run's parts after taking up the checkpoint as main_tokenbridge.py does."""
    state = training_state(TokenBridge(**SIZES), precision="fp16")
    content, found = read_newest_checkpoint(path)
    check_config(content.get("config", {}), {**state.model.config, "latent_factor": 0.5}, found)
    state.load(content, found)
    return state.model, state.ema, state.optimizer


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict:
    """A checkpoint as training writes it, after one step."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    state = training_state(
        TokenBridge(**SIZES), precision="fp16", output_dir=folder, keep_last=1,
        args={"model": "tokenbridge_tiny"},
    )  # fmt: skip
    state.model(torch.randn(2, 4, 4, 4), torch.tensor([0, 1])).backward()
    state.optimizer.step()
    state.update_ema()
    state.model.metadata = {"latent_factor": 0.5, "class_names": ["a", "b"]}
    state.epoch, state.step = 1, 2
    state.save()
    state.saver.finish()
    return torch.load(folder / "checkpoint-last.pth", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints_are_refused_or_loaded_as_they_are(content, tmp_path, kind):
    draw, refused = random.Random(kind), 0
    for _ in range(20):
        path, says = spoilt(tmp_path, content, kind, draw)
        try:
            model, ema, optimizer = resumed(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
        else:
            assert same(published_state(model), says["model"])
            averages = says.get("model_ema", says["model"])
            assert same(published_parameters(ema.module), averages)
            if "optimizer" in says:
                entries = says["optimizer"]["state"]
                assert all(
                    same(entry, entries[n]) for n, entry in optimizer.state_dict()["state"].items()
                )
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-last.pth"]
    assert refused >= {"type": 5, "dtype": 8, "flip": 10, "blank": 10}.get(kind, 18)


def test_an_undamaged_checkpoint_is_loaded(content, tmp_path):
    torch.save(content, tmp_path / "checkpoint-last.pth")
    assert same(published_state(resumed(tmp_path / "checkpoint-last.pth")[0]), content["model"])


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers.


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_tokenizers_are_refused_or_loaded_as_they_are(tmp_path, kind):
    vae = filled(AutoencoderKL(4, (1, 2), ch=32, num_res_blocks=1))
    content = {"model": dict(vae.state_dict()), "config": {"vae": vae.config, "latent_factor": 0.5}}
    draw, refused = random.Random(kind), 0
    for _ in range(7):
        path, says = spoilt(tmp_path, content, kind, draw)
        try:
            loaded, _ = AutoencoderKL.from_pretrained(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
        else:
            assert same(loaded.state_dict(), says["model"])
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-last.pth"]
    assert refused >= {"type": 1, "dtype": 2, "flip": 3}.get(kind, 6)


# --------------------------------------------------------------------------------------------------------------------
# Caches.


def write_cache(root: Path, damaged: Callable[[Path], None]) -> dict[str, np.ndarray]:
    """Three cached images, the middle one damaged; their moments."""
    values = np.random.RandomState(0).randn(3, 2, 8, 4, 4).astype(np.float32)
    (root / "0").mkdir(parents=True)
    for number, (plain, flipped) in enumerate(values):
        np.savez(root / "0" / f"{number}.png.npz", moments=plain, moments_flip=flipped)
    metadata = {
        "images": 3,
        "latent_factor": 0.5,
        "vae": {"embed_dim": 4, "ch_mult": [1, 2]},
        "complete": True,
    }
    (root / CACHE_METADATA).write_text(json.dumps(metadata))
    damaged(root / "0" / "1.png.npz")
    return values


def read_cache(root: Path) -> torch.Tensor:
    cache = CachedFolder(root, mirror=False)
    tokenizer_config(cache.metadata, root)
    cache.shape = (8, 4, 4)
    return torch.stack([moments for moments, _ in cache])


@pytest.mark.parametrize("kind", [*KINDS, "metadata"])
def test_damaged_caches_are_refused_or_loaded_as_they_are(tmp_path, kind):
    draw, refused = random.Random(kind), 0
    for number in range(10):
        root, trace, said = tmp_path / str(number), tmp_path / "trace", {}

        def damaged(path: Path, root=root, trace=trace, said=said) -> None:
            if kind in BYTES:
                path.write_bytes(BYTES[kind](path.read_bytes(), draw))
                return
            if kind == "metadata":
                path = root / CACHE_METADATA
                changed = change(
                    json.loads(path.read_text()), draw, lambda _: draw.choice(OTHERS[:10]), False
                )
                text = json.dumps(changed)
                path.write_text(
                    draw.choice([text, text[: draw.randrange(len(text))], "[" * 100_000])
                )
                return
            with np.load(path) as arrays:
                moments = torch.from_numpy(arrays["moments"])
            if kind == "type":
                kept = draw.choice(
                    [{}, {"moments": np.array("text")}, {"moments_flip": moments.numpy()}]
                )
                np.savez(path, **kept)
                return
            if kind == "trap":
                np.savez(path, moments=np.array([Trap(trace)], dtype=object), allow_pickle=True)
                return
            if kind == "dtype":
                other = draw.choice(
                    [torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]
                )
                moments = moments.to(other)
            else:
                moments = entry_damage(kind, {"moments": moments}, draw, trace)["moments"]
            said["moments"] = moments
            np.savez(path, moments=moments.numpy(), moments_flip=moments.numpy())

        values = write_cache(root, damaged)[:, 0]
        before = sorted(tmp_path.rglob("*"))
        try:
            loaded = read_cache(root)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
        else:
            if "moments" in said:
                values[1] = said["moments"].float().numpy()
            assert np.array_equal(loaded.numpy(), values)
        assert sorted(tmp_path.rglob("*")) == before
    assert refused >= {"flip": 5, "dtype": 3, "metadata": 4}.get(kind, 8)


@pytest.mark.parametrize("kind", ["cut", "nan", "type", "size", "trap"])
def test_the_command_says_in_one_line_what_is_wrong(
    refused, cached, trained, vae_path, tmp_path, kind
):
    draw = random.Random(kind)
    good = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    (tmp_path / "bad").mkdir()
    path = spoilt(tmp_path / "bad", good, "cut" if kind == "cut" else "type", draw)[0]
    if kind == "nan":
        torch.save(
            {**good, "model": {name: with_nan(v) for name, v in good["model"].items()}}, path
        )
    elif kind == "type":
        torch.save({**good, "config": {**good["config"], "channel_order": "abc"}}, path)
    elif kind == "size":
        torch.save({**good, "config": {**good["config"], "channel_heads": 0}}, path)
    elif kind == "trap":
        torch.save({**good, "optimizer": Trap(tmp_path / "trace")}, path)
    line = refused(
        "main_tokenbridge",
        "--model tokenbridge_tiny --img_size 16 --class_num 4 --buffer_size 4 --quant_bits 3 --batch_size 4 "
        f"--num_workers 0 --epochs 3 --use_cached --cached_path {cached} --output_dir {tmp_path}/out "
        f"--resume {tmp_path}/bad",
    )
    assert str(path) in line or "channel_order" in line or "zero" in line
    assert (
        not (tmp_path / "trace").exists()
        and not (tmp_path / "out" / "checkpoint-last.pth").exists()
    )
