"""python -m tools.download: the published files, from a server that speaks the Hub's routes."""

import hashlib
import json
import logging
import resource

import pytest
from safetensors.torch import save_file

from models.tiny_vae import TinyAutoencoder
from models.tokenizer import Tokenizer
from tests.conftest import filled, point_to
from tests.hub_server import COMMIT
from tests.models.test_tiny_vae import as_diffusers, write_pair
from tests.processes import forked
from tools import download
from util import errors
from util.checkpoint import hub
from util.checksums import fingerprint
from util.errors import UserError
from util.metrics.inception import find_inception_weights, inception_path


@pytest.fixture
def published(served, monkeypatch, tmp_path):
    """The published files under their names, small; torch's hub is in ``torch``."""
    models = {
        "README.md": b"card",
        "tokenbridge/tokenbridge_large/checkpoint-last.pth": b"large" * 1000,
        "tokenbridge/tokenbridge_huge/checkpoint-last.pth": b"huge" * 1000,
    }
    served.add(hub.MODELS_REPO, models)
    served.add(hub.VAE_REPO, {"kl16.ckpt": b"tokenizer" * 1000})
    served.licence = "mit"
    statistics = make_statistics()
    for name, file in (("fid_stats", "stats.npz"), ("reference", "reference.npz")):
        served.elsewhere[f"/{file}"] = statistics
        monkeypatch.setitem(download.ELSEWHERE, name, f"{served.endpoint}/{file}")
    served.elsewhere["/inception.pth"] = inception = b"inception" * 1000
    monkeypatch.setitem(download.ELSEWHERE, "inception", f"{served.endpoint}/inception.pth")
    monkeypatch.setattr(download, "INCEPTION_SHA256", hashlib.sha256(inception).hexdigest()[:8])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return served


def target_of(name: str, tmp_path):
    return inception_path() if name == "inception" else tmp_path / download.TARGETS[name]


def make_statistics() -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(2048), sigma=np.random.default_rng(0).random((64, 64)))
    return buffer.getvalue()


def test_download_fills_the_folders_that_the_commands_expect(published, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    download.main(["--output_dir", str(tmp_path)])
    for name, ending in (("large", b"large"), ("huge", b"huge")):
        path = tmp_path / f"pretrained_models/tokenbridge/tokenbridge_{name}/checkpoint-last.pth"
        assert path.read_bytes() == ending * 1000
    assert (tmp_path / "pretrained_models/vae/kl16.ckpt").read_bytes() == b"tokenizer" * 1000
    assert (tmp_path / "fid_stats/adm_in256_stats.npz").read_bytes() == published.elsewhere[
        "/stats.npz"
    ]
    # Where the metrics look for it by default.
    inception = tmp_path / "torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    assert (
        find_inception_weights(None) == inception and inception.read_bytes() == b"inception" * 1000
    )
    assert not (tmp_path / "fid_stats/VIRTUAL_imagenet256_labeled.npz").exists()
    assert "; license: mit" in caplog.text and COMMIT in caplog.text
    caplog.clear()
    before = len(
        [
            path
            for method, path, _ in published.asked
            if method == "GET" and path.startswith("/large")
        ]
    )
    download.main(["--output_dir", str(tmp_path), "--revision", "main"])
    after = len(
        [
            path
            for method, path, _ in published.asked
            if method == "GET" and path.startswith("/large")
        ]
    )
    assert caplog.text.count("exists already and is complete") == 5 and before == after
    # What is there but not whole is fetched again.
    (tmp_path / "pretrained_models/vae/kl16.ckpt").write_bytes(b"tokenizes" * 1000)
    download.main(["vae", "reference", "--output_dir", str(tmp_path)])
    assert (tmp_path / "pretrained_models/vae/kl16.ckpt").read_bytes() == b"tokenizer" * 1000
    assert (tmp_path / "fid_stats/VIRTUAL_imagenet256_labeled.npz").exists()


@pytest.mark.parametrize("name", ["vae", "fid_stats", "inception"])
def test_download_goes_on_where_it_stopped_and_refuses_what_is_damaged(published, tmp_path, name):
    target = target_of(name, tmp_path)
    file = {"vae": "kl16.ckpt", "fid_stats": "/stats.npz", "inception": "/inception.pth"}[name]
    published.damage.add(file)
    with pytest.raises(UserError, match=r"arrived damaged.*download again"):
        download.main([name, "--output_dir", str(tmp_path)])
    assert not target.exists()
    published.damage.clear()
    published.cut[file] = 1
    download.main([name, "--output_dir", str(tmp_path)])
    assert any(asked for _, _, asked in published.asked)
    expected = b"tokenizer" * 1000 if name == "vae" else published.elsewhere[file]
    assert target.read_bytes() == expected
    # Also what another process left, in the middle or at its end; or of another file.
    beside = target.with_name(f".{target.name}.incomplete")
    assert not beside.exists()
    for left, ranges in (
        (len(expected) // 3, [f"bytes={len(expected) // 3}-"]),
        (len(expected), []),
    ):
        target.unlink()
        beside.write_bytes(expected[:left])
        published.asked.clear()
        download.main([name, "--output_dir", str(tmp_path)])
        assert target.read_bytes() == expected and not beside.exists()
        assert [asked for _, _, asked in published.asked if asked] == ranges * (1 + (name == "vae"))
    target.unlink()
    beside.write_bytes(b"x" * 300)
    with pytest.raises(UserError, match=r"arrived damaged"):
        download.main([name, "--output_dir", str(tmp_path)])
    download.main([name, "--output_dir", str(tmp_path)])
    assert target.read_bytes() == expected


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("nothing", "no published file is called nothing: choose from tokenbridge_large"),
        ("tokenbridge_large --revision v9", "Epiphqny/TokenBridge has no revision v9"),
        (
            "tokenbridge_huge",
            r"no file .../tokenbridge_huge/checkpoint-last.pth in Epiphqny/TokenBridge: look for it at .*save",
        ),
        ("fid_stats", "cannot download"),
    ],
)
def test_download_says_what_it_cannot_find(published, tmp_path, arguments, says):
    published.repos[hub.MODELS_REPO].pop("tokenbridge/tokenbridge_huge/checkpoint-last.pth")
    published.elsewhere.clear()
    with pytest.raises(UserError, match=says):
        download.main([*arguments.split(), "--output_dir", str(tmp_path)])


def test_download_without_a_network(monkeypatch, tmp_path):
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "hf")
    with pytest.raises(
        UserError, match=r"cannot look into hf://Epiphqny/TokenBridge/.*start again"
    ):
        download.main(["--output_dir", str(tmp_path)])


def test_download_onto_a_full_disk(published, tmp_path, capfd):
    def fill(rank: int) -> None:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (4000, 4000)
        )  # writing on fails, as on a full disk
        errors.run(lambda: download.main(["vae", "--output_dir", str(tmp_path)]))

    assert forked(1, fill)[1] == [2]
    assert "the disk is full; free space" in capfd.readouterr().err
    assert not (tmp_path / "pretrained_models/vae/kl16.ckpt").exists()


def test_tiny_autoencoders_come_as_tokenizers(served, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = filled(TinyAutoencoder(6, ch=8, pooled=True))
    write_pair(tmp_path, model)
    for part in ("encoder", "decoder"):
        served.elsewhere[f"/{part}.pth"] = (tmp_path / f"taef2_{part}.pth").read_bytes()
        url = f"{served.endpoint}/{part}.pth"
        monkeypatch.setitem(download.ELSEWHERE, f"taef2/taef2_{part}.pth", url)
    save_file(as_diffusers(model), tmp_path / "weights.safetensors")
    config = {"_class_name": "AutoencoderTiny", "scaling_factor": 0.5}
    files = {
        "config.json": json.dumps(config).encode(),
        "diffusion_pytorch_model.safetensors": tmp_path / "weights.safetensors",
        "taef1_encoder.safetensors": b"not fetched",
    }
    served.add("madebyollin/taef1", files)
    served.licence = "mit"
    download.main(["taef1", "taef2", "--output_dir", str(tmp_path)])
    assert "; license: mit" in caplog.text and "github.com/madebyollin/taesd" in caplog.text
    assert len(list((tmp_path / "pretrained_models" / "taef1").iterdir())) == 2
    for name, latent_factor in (("taef1", 0.5), ("taef2", 1.0)):
        tokenizer = Tokenizer.from_pretrained(str(tmp_path / "pretrained_models" / name))
        assert (tokenizer.embed_dim, tokenizer.latent_factor) == (6, latent_factor)
    on_the_hub = Tokenizer.from_pretrained("hf://madebyollin/taef1")
    assert on_the_hub.fingerprint == fingerprint(model) and on_the_hub.latent_factor == 0.5
    served.damage.add("/encoder.pth")
    (tmp_path / "pretrained_models/taef2/taef2_encoder.pth").unlink()
    with pytest.raises(UserError, match="arrived damaged"):
        download.main(["taef2", "--output_dir", str(tmp_path)])
