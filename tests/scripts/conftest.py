"""Fixtures of the tests of scripts: recorded calls, two machines, short trainings, pixels of images."""

import inspect
import os
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import FID, IS, TINY
from tests.scripts.trace import Trace
from util.process_group import process_group

# --------------------------------------------------------------------------------------------------------------------
# What the scripts call, watched.


class Watched:
    """Record the calls of a method as dictionaries of its arguments by name."""

    def __init__(self, method):
        self.calls: list[dict] = []
        self.signature = inspect.signature(method)

    def note(self, *args, **kwargs) -> dict:
        """Record a call and return its arguments with defaults."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        dtype = (
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        )
        self.calls.append({**bound.arguments, "autocast": dtype})
        return bound.arguments

    def all(self, name: str) -> list:
        """Return one argument of every call."""
        return [call[name] for call in self.calls]

    def joined(self, name: str) -> list:
        """Return one argument that has a value per image, concatenated over all calls."""
        return [value for call in self.calls for value in list(call[name])]


@pytest.fixture
def sampler(monkeypatch):
    """Replace TokenBridge.sample_tokens: record calls, return latents that equal the label and rising confidences.

    A call also records the model's ``mask_token``, which differs between weights and EMA.
    """
    watched = Watched(TokenBridge.sample_tokens)

    def sample_tokens(model, *args, **kwargs):
        given = watched.note(model, *args, **kwargs)
        watched.calls[-1] |= watched.calls[-1].pop("options", {})
        watched.calls[-1]["mask_token"] = model.backbone.mask_token.detach().clone()
        side = model.grid_size * model.patch_size
        latents = (
            given["labels"].float()[:, None, None, None].expand(-1, model.vae_embed_dim, side, side)
        )
        confidence = torch.arange(model.seq_len).float().expand(len(latents), -1) - 20
        return (latents, confidence) if given["return_confidence"] else latents

    monkeypatch.setattr(TokenBridge, "sample_tokens", sample_tokens)
    return watched


@pytest.fixture
def decoder(monkeypatch):
    """Replace AutoencoderKL.decode: record calls, return pixels that are the mean of the latents over 40."""
    watched = Watched(AutoencoderKL.decode)

    def decode(vae, *args, **kwargs):
        z = watched.note(vae, *args, **kwargs)["z"]
        side = z.shape[-1] * vae.stride
        return z.float().mean(dim=(1, 2, 3))[:, None, None, None].expand(-1, 3, side, side) / 40

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    return watched


@pytest.fixture
def quick_inception(monkeypatch, tmp_path):
    """Replace Inception by the mean color: record calls; ``quick_inception.flag`` names its weights."""
    watched = Watched(FeatureExtractorInceptionV3.forward)

    def init(self, *args, **kwargs):
        torch.nn.Module.__init__(self)

    def forward(self, *args, **kwargs):
        image = watched.note(self, *args, **kwargs)["x"].float()
        colours = image.mean(dim=(2, 3)) / 255
        return torch.nn.functional.pad(colours, (0, 2045)), torch.nn.functional.pad(
            10 * colours, (0, 1005)
        )

    monkeypatch.setattr(FeatureExtractorInceptionV3, "__init__", init)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "forward", forward)
    torch.save({}, tmp_path / "inception.pth")
    watched.flag = f"--inception_weights {tmp_path}/inception.pth"
    return watched


@pytest.fixture
def measured(monkeypatch):
    """Replace compute_metrics by a mock whose FID counts the calls."""
    counted = mock.Mock(side_effect=lambda *_: {FID: float(counted.call_count), IS: 2.0})
    monkeypatch.setattr("util.metrics.compute.compute_metrics", counted)
    return counted


@pytest.fixture
def fid_stats(tmp_path):
    """Two files of reference statistics."""
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    return tmp_path / "a.npz", tmp_path / "b.npz"


# --------------------------------------------------------------------------------------------------------------------
# Two machines.


@pytest.fixture
def two_hosts(run_two, monkeypatch, tmp_path, capfd):
    """``two_hosts(script, command)`` is run_two with ranks that seem to be two hosts; returns the lines they print.

    Each rank works in ``tmp_path/host0`` or ``host1``: relative paths are not shared. Ranks wait half a second at most.
    """
    processes = process_group
    hosts = [tmp_path / f"host{rank}" for rank in (0, 1)]
    for host in hosts:
        host.mkdir()
    monkeypatch.setattr("util.files.PATIENCE", 0.5)

    def on_own_host(*flags):
        host = hosts[int(os.environ["RANK"])]
        os.chdir(host)
        os.environ["LOCAL_RANK"] = "0"  # the first process of its host
        socket.gethostname = lambda: host.name  # of this forked process
        return processes(*flags)

    def run(script: str, command: str, status: int = 0) -> list[str]:
        capfd.readouterr()
        with mock.patch(f"{script}.process_group", on_own_host):
            run_two(script, command, status)
        return capfd.readouterr().err.replace("\r", "\n").splitlines()

    return run


# --------------------------------------------------------------------------------------------------------------------
# Short trainings.

FACTOR = 0.5  # of the small tokenizer
#: A head of steps in milliseconds, and fp32, which every CPU computes alike.
QUICK = f"{TINY} --head_dim 32 --head_depth 1 --head_heads 2 --precision fp32 --device cpu"
#: 4 steps an epoch.
BASE = f"{QUICK} --warmup_epochs 0 --lr 1e-3"


@pytest.fixture
def train(run, cached, tmp_path):
    """``train("name", "--flag value")`` trains on the cache into a folder of that name, which it returns."""

    def train(name: str, flags: str = "--epochs 1") -> Path:
        run(
            "main_tokenbridge",
            f"{BASE} --use_cached --cached_path {cached} --output_dir {tmp_path}/{name} {flags}",
        )
        return tmp_path / name

    return train


class Views:
    """Identify the items of a cache by their values."""

    def __init__(self, cache: Path):
        self.known = {}
        for path in sorted(cache.glob("*/*.npz")):
            with np.load(path) as arrays:
                for name in ("moments", "moments_flip"):
                    self.known[arrays[name].tobytes()] = (
                        f"{path.parent.name}/{path.stem}",
                        name == "moments_flip",
                    )

    def of(self, rows: torch.Tensor) -> list[tuple[str, bool]]:
        """Return the name of each item, and whether it is mirrored."""
        return [self.known[row.numpy().tobytes()] for row in rows]


def seen(trace: Trace, cache: Path, each: int = 16) -> list[list[tuple[str, bool]]]:
    """Return the items that each epoch of a traced run on a cache used."""
    views = Views(cache)
    rows = [view for drawn in trace.drawn for view in views.of(drawn["moments"])]
    return [rows[i : i + each] for i in range(0, len(rows), each)]


# --------------------------------------------------------------------------------------------------------------------
# Pictures.


def pictures(folder) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def all_pixels(folder) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def grey(value: float) -> int:
    """The byte of a picture whose latents, before the division by the factor 0.5, are ``value``."""
    return round(255 * (value / 0.5 / 40 + 1) / 2)


def averaged(folder, name: str = "checkpoint-last.pth", part: str = "model_ema") -> torch.Tensor:
    return torch.load(folder / name, weights_only=True)[part]["mask_token"]
